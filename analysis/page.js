"use strict";
const byId = id => document.getElementById(id);
const num = (value, digits = 3) => value === null || value === undefined || Number.isNaN(value) ? "\u2013" : value.toFixed(digits).replace("-", "\u2212");
const rate = value => value === null ? "" : value === 0 ? "0" : value.toExponential().replace("e+", "e");
const figure = (name, value) => name === "update_ratio" && is(value) && value !== 0 && Math.abs(value) < .01 ? value.toExponential(1) : num(value);
const is = value => value !== null && value !== undefined && !Number.isNaN(value);

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) key in element ? element[key] = value : element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const scroll = (label, ...children) => make("div", {className: "scroll", tabIndex: 0, role: "region", ariaLabel: label}, ...children);

// --- Figures of the sections: drawn when they come near the window, and all of them, narrow, before the page is printed.
const panels = [...document.querySelectorAll("[data-figure]")];
function drawPanel(el) {
  if (el.dataset.drawn) return;
  el.dataset.drawn = "1";
  const figure = JSON.parse(byId(el.dataset.figure).textContent);
  Plotly.newPlot(el, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
const seen = new IntersectionObserver(entries => entries.forEach(e => { if (e.isIntersecting) drawPanel(e.target); }), {rootMargin: "800px"});
panels.forEach(el => seen.observe(el));
const shownPanels = () => panels.filter(el => !el.closest("[hidden]"));
addEventListener("beforeprint", () => shownPanels().forEach(el => { drawPanel(el); Plotly.relayout(el, {width: 330, autosize: false}); }));
addEventListener("afterprint", () => shownPanels().forEach(el => Plotly.relayout(el, {width: null, autosize: true})));

// --- Cells: filters, a plot of single cells, a table, and the view of one cell.
function explore() {
  const {settings, texts, methods, columns: C, figures, layered, predicted} = JSON.parse(byId("cells-data").textContent);
  const count = C.key.length, every = Array.from({length: count}, (_, i) => i);
  const SIZE = 50, NEAR = 14, PAD = {left: 52, right: 12, top: 12, bottom: 40};
  const LOGARITHMIC = new Set(["learning_rate", "update_ratio"]);
  const labels = {learning_rate: "learning rate", update_ratio: "R (update_ratio)"};
  const form = byId("filters"), canvas = byId("plot"), tip = byId("tip"), table = byId("cells-table"), view = byId("cell");
  let shown = every, points = [], size = SIZE, sorted = {by: null, down: false};

  // A facet is what cells are filtered by: name -> {values, of: index of its value for each cell, -1 = any}
  const facets = {};
  function facet(name, of) {
    const values = [...new Set(every.map(of).filter(is))].sort((a, b) => typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
    const index = new Map(values.map((value, place) => [value, place]));
    facets[name] = {values, of: every.map(i => is(of(i)) ? index.get(of(i)) : -1), chosen: -1};
  }
  for (const name of Object.keys(settings[0].facets)) facet(name, i => settings[C.setting[i]].facets[name]);
  facet("method", i => methods[C.method[i]].name);
  facet("seed", i => C.seed[i]);
  facet("step", i => C.step[i]);
  for (const [name, one] of Object.entries(facets)) {
    if (one.values.length < 2) continue;
    const select = make("select", {name, onchange: () => { one.chosen = select.value === "" ? -1 : Number(select.value); size = SIZE; apply(); }},
      make("option", {value: ""}, "all"), ...one.values.map((value, place) => make("option", {value: place}, String(value))));
    form.append(make("label", {}, `${name} `, select));
  }
  const axes = {};
  for (const [name, first, choice] of [["x", "learning_rate", ["learning_rate", ...figures]], ["y", "sim_aou", figures]]) {
    axes[name] = make("select", {name, onchange: draw}, ...choice.map(one => make("option", {value: one, selected: one === first}, labels[one] ?? one)));
    form.append(make("label", {}, `${name} axis `, axes[name]));
  }
  form.append(make("button", {type: "button", onclick: () => {
    for (const one of Object.values(facets)) one.chosen = -1;
    form.querySelectorAll("select").forEach(select => { if (select.name in facets) select.value = ""; });
    size = SIZE;
    apply();
  }}, "show all"));

  function apply() {
    const asked = Object.values(facets).filter(one => one.chosen >= 0);
    shown = every.filter(i => asked.every(one => one.of[i] === one.chosen || one.of[i] === -1));
    // Sections are of one setting each: those that the filters on settings leave out are hidden.
    settings.forEach((setting, place) => {
      const fits = Object.entries(setting.facets).every(([name, value]) => facets[name].chosen < 0 || facets[name].values[facets[name].chosen] === value);
      for (const element of document.querySelectorAll(`[data-setting="${place}"]`)) {
        const wasHidden = element.hidden;
        element.hidden = !fits;
        if (wasHidden && fits) element.querySelectorAll("[data-drawn]").forEach(el => Plotly.Plots.resize(el));
      }
    });
    byId("num-shown").textContent = `${shown.length.toLocaleString("en")} of ${count.toLocaleString("en")} cells`;
    draw();
    list();
  }

  // --- The plot
  const written = (tick, name) => name === "learning_rate" ? rate(tick) : String(tick).replace("-", "\u2212");
  function scale(values, low, high, isLog) {
    let [from, to] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    if (isLog) [from, to] = [Math.log10(from), Math.log10(to)];
    const margin = (to - from || Math.abs(to) * .1 || 1) * .05;
    [from, to] = [from - margin, to + margin];
    const at = value => low + ((isLog ? Math.log10(value) : value) - from) / (to - from) * (high - low);
    const ticks = [];
    if (isLog) {
      const digits = to - from > 2.5 ? [1] : [1, 2, 5];
      for (let power = Math.floor(from); power <= Math.ceil(to); power++) for (const digit of digits) ticks.push(digit * 10 ** power);
    } else {
      const rough = (to - from) / 5, base = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].find(n => n * base >= rough) * base;
      for (let tick = Math.ceil(from / step); tick * step <= to; tick++) ticks.push(tick * step);
    }
    const inside = ticks.filter(tick => (isLog ? Math.log10(tick) : tick) >= from && (isLog ? Math.log10(tick) : tick) <= to);
    const few = inside.length < 2 ? [...new Set(values)].sort((a, b) => a - b) : []; // a narrow range of a logarithmic axis
    const spread = few.length > 6 ? [few[0], few[few.length - 1]] : few;
    return {at, ticks: (few.length ? spread : inside).map(tick => Number(tick.toPrecision(6)))};
  }

  function draw() {
    const style = getComputedStyle(document.body), ink = style.color, line = style.getPropertyValue("--line");
    const width = canvas.clientWidth, height = canvas.clientHeight, dense = devicePixelRatio || 1;
    [canvas.width, canvas.height] = [width * dense, height * dense];
    const pen = canvas.getContext("2d"), x = axes.x.value, y = axes.y.value;
    pen.scale(dense, dense);
    pen.font = `11px ${style.fontFamily}`;
    pen.fillStyle = ink;
    const isDrawn = (value, name) => is(value) && (!LOGARITHMIC.has(name) || value > 0);
    const some = shown.filter(i => isDrawn(C[x][i], x) && isDrawn(C[y][i], y));
    points = [];
    byId("legend").replaceChildren();
    canvas.setAttribute("aria-label", `${labels[y] ?? y} against ${labels[x] ?? x}, ${some.length} cells`);
    if (!some.length) return pen.fillText("No cell shown has both figures.", PAD.left, height / 2);
    const across = scale(some.map(i => C[x][i]), PAD.left, width - PAD.right, LOGARITHMIC.has(x));
    const up = scale(some.map(i => C[y][i]), height - PAD.bottom, PAD.top, LOGARITHMIC.has(y));
    pen.strokeStyle = line;
    pen.beginPath();
    pen.textAlign = "center";
    for (const tick of across.ticks) {
      pen.moveTo(across.at(tick), PAD.top), pen.lineTo(across.at(tick), height - PAD.bottom);
      pen.fillText(written(tick, x), across.at(tick), height - PAD.bottom + 14);
    }
    pen.fillText(labels[x] ?? x, (PAD.left + width - PAD.right) / 2, height - 6);
    pen.textAlign = "right";
    for (const tick of up.ticks) {
      pen.moveTo(PAD.left, up.at(tick)), pen.lineTo(width - PAD.right, up.at(tick));
      pen.fillText(written(tick, y), PAD.left - 6, up.at(tick) + 4);
    }
    pen.stroke();
    pen.save();
    pen.translate(12, (PAD.top + height - PAD.bottom) / 2), pen.rotate(-Math.PI / 2), pen.textAlign = "center", pen.fillText(labels[y] ?? y, 0, 0);
    pen.restore();
    pen.lineWidth = 1.5;
    for (const i of some) {
      const point = {i, x: across.at(C[x][i]), y: up.at(C[y][i])};
      points.push(point);
      pen.beginPath();
      pen.arc(point.x, point.y, 3, 0, 2 * Math.PI);
      pen.strokeStyle = pen.fillStyle = methods[C.method[i]].colour;
      pen.globalAlpha = some.length > 1000 ? .4 : .8;
      C.collapsed[i] ? pen.stroke() : pen.fill();
    }
    pen.globalAlpha = 1;
    if (x === "learning_rate") {
      pen.lineWidth = 2;
      for (const [number, method] of methods.entries()) {
        const sums = new Map();
        for (const i of some) if (C.method[i] === number) {
          const [sum, n] = sums.get(C[x][i]) ?? [0, 0];
          sums.set(C[x][i], [sum + C[y][i], n + 1]);
        }
        pen.strokeStyle = method.colour;
        pen.beginPath();
        for (const [at, [sum, n]] of [...sums].sort((a, b) => a[0] - b[0])) pen.lineTo(across.at(at), up.at(sum / n));
        pen.stroke();
      }
    }
    const there = methods.filter((_, number) => some.some(i => C.method[i] === number));
    byId("legend").replaceChildren(...there.map(({name, colour}) => {
      const mark = make("span", {className: "mark"});
      mark.style.background = colour;
      return make("span", {}, mark, name);
    }));
  }
  const named = i => {
    const setting = settings[C.setting[i]], place = C.learning_rate[i] === null ? "" : `, lr ${rate(C.learning_rate[i])}, step ${C.step[i]}`;
    return `${methods[C.method[i]].name}${place}${C.draw[i] === "//" ? "" : `, draw ${C.draw[i].replace(/^\//, "")}`} (${setting.title})`;
  };
  function nearest(event) {
    const box = canvas.getBoundingClientRect(), [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, distance = NEAR ** 2;
    for (const point of points) {
      const square = (point.x - x) ** 2 + (point.y - y) ** 2;
      if (square < distance) [best, distance] = [point, square];
    }
    return best;
  }
  canvas.onmousemove = event => {
    const point = nearest(event);
    tip.hidden = !point;
    canvas.style.cursor = point ? "pointer" : "";
    if (!point) return;
    tip.textContent = `${named(point.i)}\n${figures.map(name => `${labels[name] ?? name} ${figure(name, C[name][point.i])}`).join(", ")}${C.collapsed[point.i] ? "; collapsed" : ""}`;
    tip.style.left = `${Math.max(0, Math.min(point.x + 12, canvas.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${point.y + 12}px`;
  };
  canvas.onmouseleave = () => { tip.hidden = true; };
  canvas.onclick = event => { const point = nearest(event); if (point) open(point.i); };
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // --- The table
  const COLUMNS = [...Object.keys(facets).filter(name => facets[name].values.length > 1 && !["method", "seed", "step"].includes(name)).map(name => [name, i => settings[C.setting[i]].facets[name]]),
    ["method", i => methods[C.method[i]].name], ["lr", i => C.learning_rate[i]], ["step", i => C.step[i]], ["draw", i => C.draw[i].replace(/^\//, "").replace(/^\/$/, "")],
    ...figures.map(name => [name, i => C[name][i]])];
  function list() {
    const order = [...shown];
    if (sorted.by !== null) {
      const of = COLUMNS[sorted.by][1], sign = sorted.down ? -1 : 1;
      order.sort((a, b) => {
        const [left, right] = [of(a), of(b)];
        if (!is(left) || !is(right)) return is(right) - is(left); // what is undefined stands last
        return sign * (typeof left === "number" ? left - right : left.localeCompare(right));
      });
    }
    const head = COLUMNS.map(([name], place) => make("th", {scope: "col", ariaSort: sorted.by === place ? sorted.down ? "descending" : "ascending" : null},
      make("button", {type: "button", onclick: () => { sorted = {by: place, down: sorted.by === place && !sorted.down}; list(); table.querySelectorAll("th button")[place].focus(); }}, (labels[name] ?? name).replaceAll("_", "_\u200b"))));
    const rows = order.slice(0, size).map(i => make("tr", {}, ...COLUMNS.map(([name, of]) => make("td", {}, figures.includes(name) ? figure(name, of(i)) : name === "lr" ? rate(of(i)) : String(of(i) ?? ""))),
      make("td", {}, make("button", {type: "button", onclick: () => open(i)}, "open"), C.diverged[i] ? " diverged" : C.collapsed[i] ? " collapsed" : "")));
    table.replaceChildren(make("thead", {}, make("tr", {}, ...head, make("th", {scope: "col"}, "cell"))), make("tbody", {}, ...rows));
    const more = byId("more");
    more.hidden = order.length <= size;
    more.textContent = `show ${Math.min(SIZE, order.length - size)} more of ${order.length - size}`;
    more.onclick = () => { size += SIZE; list(); };
  }

  // --- One cell
  const unpacked = new Map();
  function unpack(place) { // figures of all cells of a setting; null where the page holds none
    if (!unpacked.has(place)) unpacked.set(place, (async () => {
      const content = byId(`packed${place}`).textContent.trim();
      if (!content) return null;
      const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
      if (!globalThis.DecompressionStream) throw new Error("this browser is too old to unpack them");
      return new Float32Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
    })());
    return unpacked.get(place);
  }
  function figuresOf(i, all) { // {layers: name -> values, queries: name -> values}; null where the page holds none
    if (!all || C.place[i] === null) return null;
    const {num_layers: L, gold} = settings[C.setting[i]], Q = gold.length, start = C.place[i] * (layered.length * L + predicted.length * Q);
    const part = (first, length) => all.subarray(start + first, start + first + length);
    return {
      layers: Object.fromEntries(layered.map((name, n) => [name, part(n * L, L)])),
      queries: Object.fromEntries(predicted.map((name, n) => [name, part(layered.length * L + n * Q, Q)])),
    };
  }
  const beside = new Map(); // method -> learning rate that stands beside the opened cell
  let asked = null, opener = null;

  async function open(i, again = null) { // `again`: the method whose learning rate was chosen in the view
    asked = i;
    if (again === null) opener = document.activeElement;
    const place = C.setting[i], setting = settings[place];
    let all = null, trouble = "";
    try {
      all = await unpack(place);
    } catch (error) {
      trouble = ` They could not be read: ${error.message}.`;
    }
    if (asked !== i) return; // another one was asked for meanwhile
    const same = every.filter(j => C.setting[j] === place), weights = j => C.draw[j].split("/")[0];
    // Zero-shot of the same weights; ICL of the same draw, or, beside a zero-shot cell, of the first one.
    const baseline = number => same.find(j => C.method[j] === number && weights(j) === weights(i) && (number === 0 || C.method[i] === 0 || C.draw[j] === C.draw[i]));
    const columns = [0, 1].map(baseline).filter(is).filter(j => j !== i);
    const chooser = new Map();
    columns.push(i);
    for (const number of new Set(same.map(j => C.method[j]))) {
      if (number < 2 || number === C.method[i] || C.method[i] < 2) continue;
      const others = same.filter(j => C.method[j] === number && C.draw[j] === C.draw[i] && C.step[j] === C.step[i] && !C.diverged[j]);
      if (!others.length) continue;
      const best = others.find(j => C.learning_rate[j] === beside.get(number)) ?? others.reduce((a, b) => C.nll_label[b] < C.nll_label[a] ? b : a);
      columns.push(best);
      chooser.set(best, make("select", {name: `beside${number}`, ariaLabel: `learning rate of ${methods[number].name}`, onchange: event => { beside.set(number, Number(event.target.value)); open(i, number); }},
        ...others.map(j => make("option", {value: C.learning_rate[j], selected: j === best}, rate(C.learning_rate[j])))));
    }
    const found = columns.map(j => figuresOf(j, all));
    const heading = make("h3", {tabIndex: -1}, named(i));
    const close = make("button", {type: "button", onclick: () => { view.hidden = true; history.replaceState(null, "", "#cells"); (opener?.isConnected ? opener : canvas).focus(); }}, "close");
    const header = (j, chosen) => make("th", {scope: "col"}, `${methods[C.method[j]].name} `, chosen ?? make("span", {className: "rate"}, rate(C.learning_rate[j])));
    const summary = make("table", {}, make("thead", {}, make("tr", {}, make("th", {scope: "col"}, "figure"), ...columns.map(j => header(j, chooser.get(j))))), make("tbody", {}, ...figures.map(name =>
      make("tr", {}, make("th", {scope: "row"}, labels[name] ?? name), ...columns.map(j => make("td", {}, figure(name, C[name][j])))))));
    const parts = [make("div", {className: "head"}, heading, close), make("p", {className: "note"}, `Cell ${C.key[i]}${C.diverged[i] ? "; diverged: no figures" : C.collapsed[i] ? "; collapsed" : ""}. `
      + (chooser.size ? "Other methods: the same draw and step, at first the learning rate with the smallest nll_label there." : "")), scroll("Table: figures of the cell", summary)];
    const shownTexts = texts[setting.demonstrations[C.draw[i]]], trainedOn = setting.facets["trained on"];
    const instead = C.method[i] > 1 && trainedOn !== "true" ? `; finetuned on ${trainedOn.replace("_", " ")} instead` : "";
    if (shownTexts) parts.push(make("details", {}, make("summary", {}, `${shownTexts.length} demonstrations in the context${instead}`), make("ol", {className: "texts"}, ...shownTexts.map(text => make("li", {}, text)))));
    const plots = make("div", {className: "panels"});
    if (found[columns.indexOf(i)]) parts.push(plots, examples(setting, columns, found, columns.indexOf(i), header));
    else parts.push(make("p", {}, `The page holds no layers and queries of this cell.${trouble}`));
    view.replaceChildren(...parts);
    view.hidden = false;
    if (plots.isConnected) layers(plots, columns, found);
    history.replaceState(null, "", `#cell-${C.key[i]}`);
    if (again !== null) return view.querySelector(`select[name="beside${again}"]`)?.focus();
    heading.focus({preventScroll: true});
    view.style.scrollMarginTop = getComputedStyle(form).position === "sticky" ? `${form.offsetHeight + 8}px` : "8px"; // below the filters, of however many lines
    view.scrollIntoView({block: "start"});
  }

  function layers(plots, columns, found) {
    const grid = {gridcolor: "rgba(128,128,128,0.35)", zerolinecolor: "#8a8a8a", automargin: true, tickfont: {size: 10}};
    for (const name of layered) {
      const lines = columns.map((j, n) => [j, found[n]?.layers[name]]).filter(([, values]) => values && values.some(is));
      if (!lines.length) continue;
      const data = lines.map(([j, values]) => ({type: "scatter", mode: "lines+markers", marker: {size: 4}, name: methods[C.method[j]].safe, x: [...values.keys()], y: [...values].map(v => is(v) ? v : null),
        line: {color: methods[C.method[j]].colour, width: 2}, hovertemplate: `layer %{x}: %{y:.3f}<extra></extra>`}));
      const box = make("div", {style: "height: 240px"});
      plots.append(make("div", {className: "panel"}, make("h4", {}, `${labels[name] ?? name} per layer`), box));
      const layout = {height: 240, margin: {l: 8, r: 8, t: 8, b: 8}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {family: "system-ui, sans-serif", size: 11},
        xaxis: {...grid, title: {text: "layer", standoff: 4}}, yaxis: {...grid, type: LOGARITHMIC.has(name) ? "log" : "linear"}, showlegend: true, legend: {orientation: "h", y: -.3, bgcolor: "rgba(0,0,0,0)"}};
      Plotly.newPlot(box, data, layout, {displayModeBar: false, responsive: true});
    }
  }

  function examples(setting, columns, found, own, header) {
    const there = columns.map((j, n) => [j, found[n]]).filter(([, figures]) => figures), mine = found[own].queries;
    const prompts = texts[setting.prompts];
    const plain = name => make("th", {scope: "col"}, name), word = label => setting.labels[label] ?? String(label);
    const differ = q => new Set(there.map(([, {queries}]) => queries.prediction[q])).size > 1;
    const body = make("tbody"), more = make("button", {type: "button"}), only = make("input", {type: "checkbox", onchange: () => fill(SIZE)});
    function fill(limit) {
      const asked = [...setting.gold.keys()].filter(q => !only.checked || differ(q));
      body.replaceChildren(...asked.slice(0, limit).map(q => make("tr", {}, make("td", {className: "prompt"}, ...text(prompts ? prompts[q] : `query ${setting.ids[q]}`)),
        make("td", {}, setting.folds[q]), make("td", {}, word(setting.gold[q])),
        ...there.map(([, {queries}]) => make("td", {className: queries.prediction[q] === setting.gold[q] ? "right" : "wrong"}, `${queries.prediction[q] === setting.gold[q] ? "\u2713" : "\u2717"} ${word(queries.prediction[q])}`)),
        make("td", {}, num(mine.nll_label[q], 2)), make("td", {}, num(mine.sim_aou[q])))));
      more.hidden = asked.length <= limit;
      more.textContent = `show all ${asked.length}`;
      more.onclick = () => fill(asked.length);
    }
    function text(prompt) {
      return prompt.length <= 300 ? [prompt] : [make("details", {}, make("summary", {}, `${prompt.slice(0, 240)}\u2026`), prompt)];
    }
    fill(SIZE);
    const head = [...["prompt", "fold", "gold"].map(plain), ...there.map(([j]) => header(j)), ...["nll_label", "sim_aou"].map(plain)];
    return make("div", {}, make("h4", {}, "Queries"), make("label", {}, only, " only where the predictions differ"),
      prompts ? "" : make("p", {className: "note"}, "The store holds no prompts ([capture] texts = false, or written before they were kept)."),
      scroll("Table: queries of the cell", make("table", {className: "queries"}, make("thead", {}, make("tr", {}, ...head)), body)), more);
  }

  function follow() { // the address may name a cell
    const named = location.hash.startsWith("#cell-") ? C.key.indexOf(location.hash.slice("#cell-".length)) : -1;
    if (named >= 0) open(named);
  }
  addEventListener("hashchange", follow);
  apply();
  follow();
  performance.mark("cells");
}
if (byId("cells-data")) explore();
