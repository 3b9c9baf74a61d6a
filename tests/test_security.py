"""What is not trusted stays outside: models, data, stores of others, whoever reaches a port; and secrets stay inside.

| point | tested here, and in |
|---|---|
| a run listens on loopback only | `test_a_run_...`; clusters: `test_cluster_files.py`, `faults/test_jobs.py` |
| a token on every process: 401, 403, 200; no stranger joins | `faults/test_jobs.py` |
| token files 0600 in folders of 0700 | `test_cluster_files.py`, `faults/test_jobs.py`; a run on this machine writes none: `test_a_run_...` |
| a cluster without a token is refused | `test_a_cluster_...` |
| secrets in no file, log, argument, message or page | `test_a_run_...`, `test_what_travels_...`; messages: `test_sources.py`, `bad_inputs.py`; buckets: `faults/test_buckets.py` |
| no code and no pickle of a model is run, indexes name files beside them, no FIFO is opened | `test_a_hostile_...`, `test_beside_...`; `test_sources.py`, `test_pickles.py`, `bad_inputs.py` |
| no code of a data set is run | `test_a_script_...` |
| no pickle, no eval, no shell, no remote code in our own modules | `test_no_module_...` |
| the page escapes what comes from data, and loads nothing | `test_no_text_...`, `test_the_page_...`; `test_analysis.py`, in a browser `test_page.py` |
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pyarrow as pa
import pytest
import torch
from iclgd_analysis.report import write_report

from iclgd_dist import embedded, session, sources
from iclgd_dist import model as models
from iclgd_dist.cluster import Cluster
from iclgd_dist.config import ModelSpec, Resources, SweepError, load_sweep
from iclgd_dist.prepared import prepared
from iclgd_dist.schema import ATTEMPT
from iclgd_dist.store import Store, read_results
from tests import bad_inputs
from tests.bad_inputs import CASES, Case
from tests.made import make_rows, make_store
from tests.test_bad_inputs import run

ROOT = Path(__file__).parent.parent
ICLGD = [sys.executable, "-m", "iclgd_dist.cli"]
SECRETS = {"HF_TOKEN": "hf_canaryOfTheHub0123456789", "AWS_SECRET_ACCESS_KEY": "canaryOfTheBucket0123456789", "WANDB_API_KEY": "canaryOfTheTracker0123456789"}
REFUSED_SECONDS, WAITED_SECONDS = 2.0, 40


def holding(secrets: list[str], *folders: Path) -> list[Path]:
    """Return the files below some folders that hold one of the secrets."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


# --- A run


@pytest.mark.slow
def test_a_run_listens_on_loopback_alone_and_leaves_its_secrets_nowhere(sweep_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    without = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH_TOKEN", "RAY_ADDRESS"))}
    environment = without | SECRETS | {"HOME": str(home)}
    listening, commands, tokens = set[str](), set[str](), set[str]()
    with (tmp_path / "said").open("w") as said:
        driver = subprocess.Popen([*ICLGD, "run", sweep_file.name], cwd=sweep_file.parent, env=environment, stdout=said, stderr=said, start_new_session=True)
        while driver.poll() is None:
            look(driver.pid, listening, commands, tokens)
            time.sleep(0.1)
    store = Store(sweep_file.parent / "results" / "tiny")
    assert driver.returncode == 0 and len(read_results(store).cells) == 19, (tmp_path / "said").read_text()
    assert listening == {"127.0.0.1"}
    (token,) = tokens  # of this run alone
    assert not list(home.rglob("*token*")), "the token of a run is never written"
    subprocess.run([*ICLGD, "report", "results/tiny"], cwd=sweep_file.parent, env=environment, capture_output=True, timeout=120, check=True)
    logs = list(Path("/tmp/ray").glob(f"session_*_{driver.pid}"))
    secrets = [*SECRETS.values(), token]
    assert logs and (store.root / "report.html").exists() and not holding(secrets, tmp_path, *logs)
    assert len(commands) > 3 and not [secret for secret in secrets if secret in str(commands)]
    results = read_results(store)  # files may be compressed
    tables = [getattr(results, name).to_pylist() for name in ("cells", "examples", "attempts")]
    assert all(tables) and not [secret for secret in secrets if secret in str(tables)]
    for folder in logs:
        shutil.rmtree(folder)


def look(driver: int, listening: set[str], commands: set[str], tokens: set[str]) -> None:
    """Add where a process and all below it listen, what they were called with, and their tokens of Ray."""
    try:
        family = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            listening |= {each.laddr.ip.removeprefix("::ffff:") for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
            commands.add(" ".join(process.cmdline()))
            tokens |= {value for name, value in process.environ().items() if name == "RAY_AUTH_TOKEN"}
        except psutil.Error:  # it has ended meanwhile
            pass


def test_what_travels_with_a_job_holds_no_secret(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (sweep_file.parent / ".env").write_text(f"HF_TOKEN={SECRETS['HF_TOKEN']}")
    sweep_file.write_text(sweep_file.read_text().replace('source = "model"', f'source = "{sweep_file.parent / "model"}"'))
    sent: list[Any] = []

    def submit(**job: Any) -> None:
        shutil.copytree(job["runtime_env"]["working_dir"], tmp_path / "sent")
        sent.append(job)

    cluster = Cluster.__new__(Cluster)
    cluster.address, cluster._errors = "http://127.0.0.1:8265", (RuntimeError, OSError, RuntimeError)
    cluster._client = SimpleNamespace(list_jobs=list, submit_job=submit)
    cluster.submit(load_sweep(sweep_file), sweep_file, Store("/shared/results"))
    assert len(sent) == 1 and not [secret for secret in SECRETS.values() if secret in str(sent)]
    assert (tmp_path / "sent" / "tiny.toml").exists() and not holding(list(SECRETS.values()), tmp_path / "sent")


def test_a_cluster_without_a_token_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for use in (
        lambda: Cluster("http://127.0.0.1:1"),
        lambda: session.check_place(Resources(), "127.0.0.1:1"),
        lambda: session.connected("127.0.0.1:1").__enter__(),
    ):
        with pytest.raises(SweepError, match=r"Ray runs code for whoever reaches its ports; .* --insecure-no-auth"):
            use()
    with pytest.raises(SweepError, match="no Ray cluster answers"):
        Cluster("http://127.0.0.1:1", is_open=True)


# --- Models and data


HOSTILE_WORDS = ("FIFO", "code in it", "code of its own", "outside", "full path", "adapter", "device", "a pickle for a shard")
HOSTILE = [case for case in CASES if case.code == 2 and any(word in case.name for word in HOSTILE_WORDS)]


@pytest.fixture
def _stopped_in_time(tmp_path: Path) -> Iterator[None]:
    """End what waits for ever: first whoever opened a FIFO is given its end, since a library in C may not heed a signal before."""

    def late(number: int, frame: Any) -> NoReturn:
        raise TimeoutError("waits, for a FIFO perhaps")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGALRM, late)
    signal.alarm(WAITED_SECONDS)
    feed = f"sleep {WAITED_SECONDS + 1}; find {tmp_path} -type p -exec timeout 1 sh -c ': > \"$1\"' - {{}} ';'"
    feeder = subprocess.Popen(["bash", "-c", feed], start_new_session=True)
    yield
    signal.alarm(0)
    os.killpg(feeder.pid, signal.SIGKILL)
    feeder.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_stopped_in_time")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in HOSTILE])
def test_a_hostile_input_is_refused_within_two_seconds_and_leaves_no_marker(
    case: Case, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in bad_inputs.environment(case, good.parent / "cache", "").items():
        monkeypatch.setenv(name, value)
    folder = bad_inputs.prepared(case, good, tmp_path / "case")
    before = bad_inputs.listing(folder)
    started = time.process_time()  # the machine may be busy; what waits is ended
    outcome = run(case, folder, monkeypatch, capsys)
    assert time.process_time() - started < REFUSED_SECONDS
    assert outcome.code == 2
    assert bad_inputs.faults(case, outcome, folder, before) == [], bad_inputs.said(case, outcome, folder)


MARKS = """
import os
os.mkdir({marker!r})
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): ...
class Model(LlamaForCausalLM): ...
class Mine(PreTrainedTokenizerFast): ...
"""


@pytest.mark.usefixtures("_stopped_in_time")
def test_beside_good_weights_nothing_is_run_and_nothing_is_opened(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code and pickles lie there, and a FIFO under every name that a library may look for; transformers knows the architecture by itself."""
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where the pickle would leave its marker
    directory, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_model, directory)
    (directory / "mine.py").write_text(MARKS.format(marker=str(marker)))
    torch.save({"weight": bad_inputs.Marks()}, directory / "training_args.bin")
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(values | {"auto_map": classes}))
    (directory / "additional_chat_templates").mkdir()
    decoys = ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    for name in [*decoys, "processor_config.json", "tekken.json", "generation_config.json"]:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
    identity = sources.identify(spec := ModelSpec(source=str(directory)))
    tokenizer = sources.load_tokenizer(identity)
    assert tokenizer("plum")["input_ids"] and type(tokenizer).__module__.startswith("transformers.")
    for dtype in ("float32", "bfloat16"):  # as they are, and converted
        made = prepared(sources.fetch(identity), identity.content_hash, storage_dtype=dtype, compute_dtype="float32")
        model = models.load(made, spec, Resources(), storage_dtype=dtype).model
        assert type(model).__module__.startswith("transformers.models.llama")
    assert not marker.exists()
    sys.path.insert(0, str(directory))
    try:
        import mine  # noqa: F401  it would have left its marker
    finally:
        sys.path.remove(str(directory))
    assert marker.exists()


def test_a_script_or_a_pickle_in_a_data_set_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cornell-movie-review-data__rotten_tomatoes"
    for name, content in ((f"{folder.name}.py", "import os; os.mkdir('marker')"), ("train.pkl", bad_inputs.Marks())):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else pickle.dumps(content))
        with pytest.raises(SweepError, match="needs the dataset cornell-movie-review-data/rotten_tomatoes, which cannot be loaded"):
            embedded.read_hub("mr", mirror=str(tmp_path))
        assert not (tmp_path / "marker").exists()


# --- Our own code

NO_PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
MAY = {  # module -> what it alone may do
    "pickles": {"imports UnpicklingError of pickle"},  # an error's name
    "own_code": {"calls exec"},  # code that the sweep file names, which is trusted
}


def dangers(source: str) -> list[str]:
    """Return what could run code that comes with data: each place of it in a module's text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in NO_PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in NO_PICKLES:
            found += [f"imports {alias.name} of {node.module}" for alias in node.names]
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append("trust_remote_code is not a keyword")
        elif isinstance(node, ast.Call):
            found += _dangers_of_call(ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords})
    return found


def _dangers_of_call(called: str, keywords: dict[str | None, str]) -> Iterator[str]:
    last = called.rpartition(".")[2]
    if called in ("eval", "exec", "__import__", "os.system", "os.popen", "torch.hub.load") or last in (
        "read_pickle",
        "to_pickle",
        "getoutput",
        "getstatusoutput",
    ):
        yield f"calls {called}"
    if called == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if "allow_pickle" in keywords:
        yield f"{called} with allow_pickle"
    if called.startswith("yaml.") and last != "safe_load":
        yield f"calls {called}"
    if keywords.get("shell", "False") != "False":
        yield f"{called} with shell={keywords['shell']}"
    if keywords.get("trust_remote_code", "False") != "False" or (last in ("from_pretrained", "from_config") and "trust_remote_code" not in keywords):
        yield f"{called} without trust_remote_code=False"
    if (
        last == "from_pretrained"
        and "AutoModel" in called
        and "gguf" not in str(keywords)
        and keywords.get("use_safetensors") != "True"
        and None not in keywords
    ):
        yield f"{called} without use_safetensors=True"


OURS = sorted(path for folder in ("iclgd_dist", "analysis") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_no_module_of_ours_runs_what_comes_with_data(path: Path) -> None:
    assert set(dangers(path.read_text())) == MAY.get(path.stem, set())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pd.read_pickle(path)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "AutoModelForCausalLM.from_config(config, trust_remote_code=ask())",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_a_planted_danger_is_found(line: str) -> None:
    assert dangers(line)


# --- The page

BAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&[/bold]"


class Elements(HTMLParser):
    """The elements of a page, each with the names of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = set[tuple[str, ...]]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *sorted(name for name, _ in attrs)))


def page_with(root: Path, text: str) -> str:
    """Return the page of a store in which every text that comes from data, models, sweeps and errors holds this one."""
    rows = make_rows(tasks=(f"task{text}",), rates={"vanilla": (1e-3, 1e-2), f"mine{text}": (1e-3, 1e-2)}, words=["Red", f"label{text}"], model=f"model{text}")
    for row in rows:
        row |= {name: f"{name}{text}" for name in ("sweep", "model_source", "model_revision", "device", "host", "git_commit", "train_on") if row.get(name)}
        row |= {"model_notes": [f"note{text}"], "versions": json.dumps({f"library{text}": f"version{text}"})}
        if row["kind"] == "zero_shot":
            row["prompts"] = [f"prompt{text}" for _ in row["examples"]]
        if row["kind"] == "icl":
            row["demonstrations"] = [f"demonstration{text}"] * 4
    store = Store(make_store(root, rows))
    attempt: dict[str, Any] = {name: f"{name}{text}" if kind == pa.string() else 1 for name, kind, _ in ATTEMPT}
    store.record_attempt(attempt | {"outcome": f"failed{text}"})
    return write_report(root).read_text()


def test_no_text_of_data_models_labels_tasks_or_errors_becomes_an_element_of_the_page(tmp_path: Path) -> None:
    hostile, harmless = page_with(tmp_path / "hostile", BAD), page_with(tmp_path / "harmless", "")
    for name in ("task", "label", "model", "mine", "failed", "library", "sweep"):
        assert f"{name}&lt;/script&gt;" in hostile or rf"{name}\u003c/script\u003e" in hostile, name
    assert Elements(hostile).found == Elements(harmless).found
    assert "<script>alert" not in hostile and hostile.count("<script") == harmless.count("<script")


def test_the_page_makes_text_of_what_it_unpacks() -> None:
    script = (ROOT / "analysis" / "page.js").read_text()
    assert "textContent" in script
    for wrong in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "setTimeout('", "import("):
        assert wrong not in script
    assert "|safe" not in (ROOT / "analysis" / "report.html.j2").read_text().replace(" ", "")


def test_hostile_names_are_text_on_a_terminal_too(tmp_path: Path) -> None:
    page_with(tmp_path / "store", BAD)
    for command in ("status", "report"):
        done = subprocess.run([*ICLGD, command, "store"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "[/bold]" in done.stdout, done.stdout + done.stderr
