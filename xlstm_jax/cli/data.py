"""`xlstm-jax data prepare`, `train-tokenizer` and `inspect`: from raw text to shards of tokens."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from xlstm_jax.cli import console, options, subcommands
from xlstm_jax.cli.data_progress import ProgressDisplay
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError
from xlstm_jax.data import inspect
from xlstm_jax.data.config import Split
from xlstm_jax.data.documents import Document, File, find_files, read
from xlstm_jax.data.inspect import Inspection, Lengths
from xlstm_jax.data.prepare import PrepareConfig, Result, prepare
from xlstm_jax.data.train_tokenizer import train_bpe
from xlstm_jax.errors import printable, quote_path

Input = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IN")]
Output = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]

BAR_WIDTH = 40
"""Characters of the longest bar of a histogram."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare(options.ModelCommand):
    """Tokenizes text into shards, once, for any number of runs; the same command resumes."""

    source: Input  # file or folder with text, or with records (JSON lines, Parquet)
    out: Output  # folder; new, empty, or prepared by the same command
    tokenizer: str = "byte"  # tokenizer.json, .model of sentencepiece, a folder, hf://org/name
    pattern: str | None = None  # files of a folder to read: *.jsonl.gz; None: all with a reader
    text_field: str = "text"  # field or column with the text
    split: Split | None = None  # split of all documents; None: by names of files, or by content
    workers: int | None = None  # processes; None: one for each core
    shard: str = "0/1"  # I/N: the part of machine I, from 0, of N that share the work
    chat: bool = False  # records are conversations: apply the chat template of the tokenizer
    messages_field: str = "messages"  # field or column with a conversation
    fresh: bool = False  # delete what was prepared in OUT before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(options.ModelCommand):
    """Counts documents and tokens, and shows lengths of documents and samples."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]  # tokens, or text
    split: Split | None = None  # the only one to read; None: all
    samples: int = 3  # documents to show of each split
    tokenizer: str | None = None  # for samples; None: that of the data
    pattern: str | None = None  # files of raw text to read
    text_field: str = "text"  # field or column with the text
    json: bool = False  # print the figures as JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Trains a byte-level BPE on the training split of raw text."""

    source: Input  # file or folder with text, or with records
    out: Output  # folder for tokenizer.json
    vocab_size: int  # tokens, with 256 for the bytes and one that ends documents
    pattern: str | None = None  # files of a folder to read
    text_field: str = "text"  # field or column with the text
    max_bytes: int | None = None  # of text to train on, of each file in proportion; None: all


def run(argv: list[str]) -> int:
    """Runs a command on data; raises ConfigError if an option or the data are invalid."""
    return subcommands.run("data", COMMANDS, argv)


class _Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: int, frame: FrameType | None):
        self.number = number


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        for other in previous:  # a second signal would interrupt the cleanup
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped(number, frame)

    previous = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _prepare(argv: list[str]) -> int:
    args = options.parse("data prepare", Prepare, argv)
    names = {field.name for field in dataclasses.fields(PrepareConfig)}
    cfg = PrepareConfig(**{n: value for n, value in vars(args).items() if n in names})
    cfg = dataclasses.replace(cfg, imports=tuple(options.modules_to_import(argv)))
    display, start = ProgressDisplay(), time.monotonic()
    try:
        with _stop_on_signals(), display:
            result = prepare(
                cfg,
                args.out,
                shard=args.shard,
                num_workers=args.workers,
                fresh=args.fresh,
                on_progress=display.update,
            )
    except _Stopped as stopped:
        name = signal.Signals(stopped.number).name
        print(
            f"xlstm-jax: interrupted by {name}; {display.shards()} are finished, and the same "
            "command resumes.",
            file=sys.stderr,
        )
        return 128 + stopped.number
    _print_result(args.out, result, display, time.monotonic() - start)
    return DONE


def _print_result(out: Path, result: Result, display: ProgressDisplay, seconds: float) -> None:
    """Prints the totals of this process, and of all if the data are complete."""
    counts = display.last.counts
    fields = {"written": f"{quote_path(out)}, {display.shards()}"}
    if counts.documents:
        fields |= {
            "documents": f"{counts.documents:,}",
            "tokens": f"{counts.tokens:,}, {_ratio(counts.tokens, counts.num_bytes)} per byte",
            "bytes": f"{counts.num_bytes:,}",
            "time": f"{seconds:.1f} s, {counts.num_bytes / 1e6 / seconds:.2f} MB/s",
        }
    if result.manifest is None:
        fields["manifest"] = (
            f"not written yet: {result.missing:,} shards of other processes are not finished; the "
            "last one writes it"
        )
    console.print_fields(fields)
    if result.manifest is not None:
        totals = [
            (
                split,
                sum(info.documents for info in shards),
                sum(info.tokens for info in shards),
                sum(info.num_bytes for info in shards),
            )
            for split, shards in result.manifest.splits.items()
        ]
        _print_splits(totals)


def _ratio(tokens: int, num_bytes: int) -> str:
    return f"{tokens / num_bytes:.4f}" if num_bytes else "-"


def _print_splits(totals: Sequence[tuple[str, int, int | None, int | None]]) -> None:
    cells = [
        [
            split,
            f"{documents:,}",
            "-" if tokens is None else f"{tokens:,}",
            "-" if num_bytes is None else f"{num_bytes:,}",
            _ratio(tokens, num_bytes) if tokens and num_bytes else "-",
        ]
        for split, documents, tokens, num_bytes in totals
    ]
    console.write("\n")
    console.print_table(["split", "documents", "tokens", "bytes", "tokens per byte"], cells)


def _inspect(argv: list[str]) -> int:
    args = options.parse("data inspect", Inspect, argv)
    if args.samples < 0:
        raise ConfigError(f"--samples must be at least 0, got {args.samples}; 0 shows none.")
    inspection = inspect.inspect(
        args.source,
        args.split,
        num_samples=args.samples,
        tokenizer=args.tokenizer,
        pattern=args.pattern,
        text_field=args.text_field,
    )
    if args.json:
        console.print_json(_to_json(inspection))
        return DONE
    fields = {"data": f"{quote_path(args.source)}, {inspection.kind}"}
    if inspection.tokenizer is not None:
        info = inspection.tokenizer
        fields["tokenizer"] = f"{info.name}, {info.vocab_size:,} tokens, SHA-256 {info.sha256}"
    console.print_fields(fields)
    _print_splits(
        [(n, s.lengths.count, s.tokens, s.num_bytes) for n, s in inspection.splits.items()]
    )
    for name in inspection.splits:
        _print_split(inspection, name)
    return DONE


def _to_json(inspection: Inspection) -> dict[str, Any]:
    """The figures that are printed otherwise; lengths in tokens, of raw files in bytes."""
    splits = {
        name: {
            "documents": summary.lengths.count,
            "tokens": summary.tokens,
            "bytes": summary.num_bytes,
            "lengths": _figures(summary.lengths),
            "histogram": summary.lengths.octaves(),  # shortest, longest, documents
            "samples": summary.samples,
        }
        for name, summary in inspection.splits.items()
    }
    return {"kind": inspection.kind, "tokenizer": inspection.tokenizer, "splits": splits}


def _figures(lengths: Lengths) -> dict[str, int]:
    """Statistics of the lengths of documents."""
    return {
        "median": lengths.percentile(50),
        "mean": round(lengths.total / lengths.count),
        "90 %": lengths.percentile(90),
        "99 %": lengths.percentile(99),
        "longest": lengths.max,
    }


def _print_split(inspection: Inspection, name: str) -> None:
    """Prints the lengths of the documents of a split, and samples."""
    summary = inspection.splits[name]
    lengths, unit = summary.lengths, "bytes" if summary.tokens is None else "tokens"
    text = ", ".join(f"{label} {value:,}" for label, value in _figures(lengths).items())
    console.write(f"\n{name}: {unit} of a document: {text}\n\n")
    _print_histogram(lengths)
    for number, sample in enumerate(summary.samples, 1):
        console.write(f"\n{name}, sample {number}:\n")
        # One line of the text is one line here; control characters could change the terminal.
        console.write("".join(f"    {printable(line)}\n" for line in sample.splitlines()))


def _print_histogram(lengths: Lengths) -> None:
    octaves = lengths.octaves()
    most = max(count for _, _, count in octaves)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    grid.add_column(justify="right")
    for low, high, count in octaves:
        bar = ProgressBar(total=most, completed=count, width=BAR_WIDTH)
        grid.add_row(f"{low:,}-{high:,}", f"{count:,}", bar)
    Console().print(grid)


def _train_tokenizer(argv: list[str]) -> int:
    args = options.parse("data train-tokenizer", TrainTokenizer, argv)
    if args.max_bytes is not None and args.max_bytes < 1:
        raise ConfigError(f"--max-bytes must be at least 1, got {args.max_bytes}; leave it out.")
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(
            f"OUT must be a folder, but {quote_path(args.out)} is a file; choose another."
        )
    files = find_files(args.source, args.pattern)
    train_bpe(_training_texts(files, args.text_field, args.max_bytes), args.vocab_size, args.out)
    console.print_fields({"written": quote_path(args.out), "vocabulary": f"{args.vocab_size:,}"})
    return DONE


def _training_texts(files: list[File], text_field: str, max_bytes: int | None) -> Iterator[bytes]:
    """Texts of the training split, of each file about the same share."""
    total = sum(file.size for file in files)
    for file in files:
        left = file.size * max_bytes // total + 1 if max_bytes is not None else math.inf
        for split, document in read(file, text_field=text_field):
            if left <= 0:
                break
            if split == "train":
                _check_utf8(document)
                yield document.data
                left -= len(document.data)


def _check_utf8(document: Document) -> None:
    try:
        document.data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{quote_path(document.name)} must be UTF-8, but byte {error.start:,} is not; correct "
            "it, or exclude it with --pattern."
        ) from error


COMMANDS = {"prepare": _prepare, "inspect": _inspect, "train-tokenizer": _train_tokenizer}
"""Name of a command -> its function."""
