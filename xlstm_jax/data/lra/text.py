"""The text sets of the Long Range Arena: ListOps and Retrieval, tab-separated files.

Source: Tay et al. 2020, arXiv:2011.04006. Only the offsets of lines are in memory; a batch reads
its own lines.
"""

import csv
import functools
import pathlib

import numpy as np
from jaxtyping import Int64

from xlstm_jax.data.config import Split
from xlstm_jax.data.lra.labeled import Labeled, Sequences, padded
from xlstm_jax.data.synthetic import listops
from xlstm_jax.errors import ConfigError, quote, quote_path

LISTOPS_LEN = 2000
DOCUMENT_LEN = 4000
"""Bytes of each of the two documents of Retrieval that count."""

_LISTOPS_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
_RETRIEVAL_FILES = {
    "train": "new_aan_pairs.train.tsv",
    "valid": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
_BYTE = 1  # id of the byte 0; 0 is padding


def read_listops(folder: pathlib.Path, split: Split, seq_len: int = LISTOPS_LEN) -> Labeled:
    """Expressions of `basic_{train,val,test}.tsv`: columns Source and Target, after a header.

    Raises:
        ConfigError: a file is missing, or a line is not an expression and its value.
    """
    path = require(folder / _LISTOPS_FILES[split], "basic_{train,val,test}.tsv in one folder")
    lines = _Lines(path, skip=1)

    def read(index: Int64[np.ndarray, "B"]) -> Sequences:
        return padded([listops.encode(lines.fields(i, 2)[0]) for i in index.tolist()], seq_len)

    return Labeled(read, lines.labels(-1, 10), listops.VOCAB_SIZE, str(path))


def read_retrieval(folder: pathlib.Path, split: Split, document_len: int = DOCUMENT_LEN) -> Labeled:
    """Pairs of `new_aan_pairs.{train,eval,test}.tsv`: label, two ids, two texts, without a header.

    Bytes are tokens. The documents follow each other, with segment ids 1 and 2.

    Raises:
        ConfigError: a file is missing, or a line has other columns.
    """
    layout = "new_aan_pairs.{train,eval,test}.tsv in one folder"
    path = require(folder / _RETRIEVAL_FILES[split], layout)
    lines = _Lines(path)

    def read(index: Int64[np.ndarray, "B"]) -> Sequences:
        shape = len(index), 2 * document_len
        tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for n, i in enumerate(index.tolist()):
            first = 0
            for document, text in enumerate(lines.fields(i, 5)[3:], start=1):
                data = np.frombuffer(text.encode()[:document_len], np.uint8)
                tokens[n, first : first + len(data)] = data.astype(np.int32) + _BYTE
                segment_ids[n, first : first + len(data)] = document
                first += len(data)
        return tokens, segment_ids

    return Labeled(read, lines.labels(0, 2), 256 + _BYTE, str(path))


def require(path: pathlib.Path, layout: str) -> pathlib.Path:
    """The path; raises ConfigError, with the layout to provide, if it does not exist."""
    if not path.exists():
        raise ConfigError(
            f"{quote_path(path)} does not exist; the expected layout is {layout}. Nothing is "
            "downloaded."
        )
    return path


class _Lines:
    """The lines of a tab-separated file, read by number."""

    def __init__(self, path: pathlib.Path, skip: int = 0):
        self.path, self.skip = path, skip
        with path.open("rb") as file:
            lengths = np.fromiter((len(line) for line in file), np.int64)
        self.ends = np.cumsum(lengths)
        self.starts = (self.ends - lengths)[skip:]
        self.ends = self.ends[skip:]

    def fields(self, number: int, count: int) -> list[str]:
        """The fields of a line, unquoted; raises ConfigError unless their number is `count`."""
        with self.path.open("rb") as file:
            file.seek(self.starts[number])
            line = file.read(self.ends[number] - self.starts[number]).decode()
        fields = _split(line)
        if len(fields) != count:
            raise self.error(number, f"{count} columns separated by tabs", len(fields))
        return fields

    def labels(self, column: int, num_classes: int) -> Int64[np.ndarray, "N"]:
        """The class in a column of every line."""
        parse = functools.partial(self._label, column=column, num_classes=num_classes)
        with self.path.open("rb") as file:
            lines = list(file)[self.skip :] if self.skip else file
            return np.fromiter((parse(n, line) for n, line in enumerate(lines)), np.int64)

    def _label(self, number: int, line: bytes, *, column: int, num_classes: int) -> int:
        # Only the column of the class is parsed: texts have thousands of characters.
        parts = line.rsplit(b"\t", 1) if column < 0 else line.split(b"\t", 1)
        text = parts[column].strip().strip(b'"').decode(errors="replace")
        try:
            label = float(text)
        except ValueError:
            label = -1.0
        if label not in range(num_classes):
            raise self.error(number, f"a class from 0 to {num_classes - 1}", text)
        return int(label)

    def error(self, number: int, demand: str, got: object) -> ConfigError:
        """The error of an invalid line."""
        line = number + self.skip + 1
        return ConfigError(
            f"{quote_path(self.path)}, line {line}: expected {demand}, got {quote(got)}; the file "
            "must be that of the published archive."
        )


def _split(line: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter="\t"), [])
