"""Tables of runs: CSV and Parquet to columns with one spelling, checked before they are fitted."""

import csv
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config.fields import did_you_mean
from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path
from xlstm_jax.typing import Bool, Shaped

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "model": ("family", "arch", "architecture"),
    "context_length": ("seq_len", "context", "sequence_length"),
    "num_params": ("params", "n_params", "parameters", "N"),
    "train_tokens": ("tokens", "num_tokens", "D"),
    "train_flops": ("flops", "total_flops", "compute", "C"),
    "val_loss": ("valid_loss", "validation_loss", "eval_loss", "loss"),
    "run_id": ("id",),
}
"""Column -> other names that are understood; the first that a table has is used."""

REQUIRED = ("num_params", "train_tokens", "val_loss")

CONVENTIONS = ("flops_convention", "flop_count", "attention_flops", "vocab_size", "tokenizer")
"""Columns that must have one value in everything that is fitted together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Columns of equal length, one value for each run: float64, or text."""

    columns: Mapping[str, Shaped[np.ndarray, "n"]]
    num_rows: int  # of the file
    sha256: str  # of the file
    notes: tuple[str, ...] = ()  # what was dropped or assumed

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "n"]:
        if name not in self.columns:
            hint = did_you_mean(name, self.columns)
            raise ConfigError(f"the table has no column {quote(name)}; {hint}")
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def select(self, mask: Bool[np.ndarray, "n"], note: str = "") -> "Runs":
        """The runs where `mask` is True, with a note about the others."""
        columns = {name: column[mask] for name, column in self.columns.items()}
        notes = (*self.notes, note) if note and not mask.all() else self.notes
        return dataclasses.replace(self, columns=columns, notes=notes)

    def name(self, index: int) -> str:
        """What identifies a run in a message: its id, or the sizes of its model and data."""
        for column in ("run_id", "run_name"):
            if column in self.columns and str(self.columns[column][index]):
                return str(self.columns[column][index])
        return f"N={self['num_params'][index]:.6g} D={self['train_tokens'][index]:.6g}"

    def names(self, mask: Bool[np.ndarray, "n"], limit: int = 5) -> str:
        """The first of the runs where `mask` is True, for a message."""
        chosen = np.flatnonzero(mask).tolist()
        text = ", ".join(self.name(index) for index in chosen[:limit])
        return text + (f" and {len(chosen) - limit} more" if len(chosen) > limit else "")


def read_table(path: str | Path, columns: Mapping[str, str] | None = None) -> Runs:
    """Reads a CSV or Parquet file with one run per line.

    Args:
        columns: names of `SYNONYMS` -> the table's own names, where these are not understood.

    Raises:
        ConfigError: the file is missing, of another format, or lacks a column of `REQUIRED`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{quote_path(path)} is not a file; pass a .csv or .parquet table.")
    data = path.read_bytes()
    if path.suffix == ".csv":
        try:
            lines = list(csv.reader(data.decode("utf-8-sig").splitlines()))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(
                f"{quote_path(path)} is not CSV in UTF-8 ({error}); export it again."
            ) from error
        header = lines[0] if lines else []
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(header) and line:
                raise ConfigError(
                    f"{quote_path(path)}, line {number}, has {len(line)} values for {len(header)} "
                    "columns; correct it."
                )
        records = [dict(zip(header, line, strict=True)) for line in lines[1:] if line]
    elif path.suffix == ".parquet":
        parquet = import_optional(
            "pyarrow.parquet", "a Parquet table", install="xlstm-jax[data]", package="pyarrow"
        )
        records = parquet.read_table(path).to_pylist()
    else:
        raise ConfigError(f"{quote_path(path)} is not a .csv or .parquet file; convert it.")
    return from_records(records, columns, sha256=hashlib.sha256(data).hexdigest())


def from_records(
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    *,
    sha256: str = "",
) -> Runs:
    """The runs of dictionaries, such as the records of `collect`; see `read_table`."""
    if not records:
        raise ConfigError("the table must have at least one run, got none; fill it.")
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: _column([record.get(name) for record in records]) for name in names}
    for name, own in (columns or {}).items():
        if own not in values:
            hint = did_you_mean(own, values)
            raise ConfigError(f"columns[{quote(name)}] names {quote(own)}, which is absent; {hint}")
        values[name] = values[own]
    for name, others in SYNONYMS.items():
        own = next((other for other in others if other in values), None)
        if name not in values and own is not None:
            values[name] = values[own]
    for name in REQUIRED:
        if name not in values:
            known = ", ".join((name, *SYNONYMS[name]))
            raise ConfigError(
                f"the table has no column {name}; name it {known}, or name yours in `columns` of "
                "an analysis file."
            )
        if values[name].dtype != np.float64:
            text = next(x for x in values[name].tolist() if _number(x) is None)
            raise ConfigError(f"column {name} must hold numbers, got {quote(text)}; correct it.")
    notes = []
    if "train_flops" not in values:
        values["train_flops"] = 6 * values["num_params"] * values["train_tokens"]
        notes.append("train_flops is absent: 6 * num_params * train_tokens")
    return Runs(columns=values, num_rows=len(records), sha256=sha256, notes=tuple(notes))


def _column(values: Sequence[Any]) -> np.ndarray:
    """float64 if every value is a number or missing, else text."""
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        return np.array(numbers, np.float64)
    return np.array(["" if value is None else str(value) for value in values])


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return np.nan
    if isinstance(value, bool):  # of Parquet; text in CSV
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def without_missing(runs: Runs) -> Runs:
    """The runs that have a loss, sizes and FLOPs, with the number of the others in a note.

    Raises:
        ConfigError: one of these is zero, negative or infinite.
    """
    used = (*REQUIRED, "train_flops")
    is_missing = np.any([np.isnan(runs[name]) for name in used], axis=0)
    note = f"dropped {is_missing.sum()} runs without a loss or a size: {runs.names(is_missing)}"
    runs = runs.select(~is_missing, note)
    for name in used:
        is_bad = ~((runs[name] > 0) & np.isfinite(runs[name]))
        if is_bad.any():
            raise ConfigError(
                f"{name} must be positive and finite, got {runs[name][is_bad][0]} for "
                f"{runs.names(is_bad)}; correct or drop these runs."
            )
    return runs


def check_ids(runs: Runs) -> None:
    """Raises ConfigError if two runs have the same id; empty ids are not compared."""
    if "run_id" not in runs.columns:
        return
    ids = runs["run_id"].astype(str)
    values, counts = np.unique(ids[(ids != "") & (ids != "nan")], return_counts=True)
    if (counts > 1).any():
        raise ConfigError(
            f"run_id must be unique, got {quote(str(values[counts > 1][0]))} for "
            f"{counts.max()} runs; remove the copies."
        )


def without_duplicates(runs: Runs, *, drop: bool) -> Runs:
    """The runs without copies: equal model, context, sizes, FLOPs and loss, whatever their ids.

    Raises:
        ConfigError: a run has a copy and `drop` is False.
    """
    names = ("model", "context_length", *REQUIRED, "train_flops")
    seen: dict[tuple, int] = {}
    is_copy = np.zeros(len(runs), bool)
    columns = [runs[name].tolist() for name in names if name in runs.columns]
    for index, key in enumerate(zip(*columns, strict=True)):
        is_copy[index] = seen.setdefault(key, index) != index
    if is_copy.any() and not drop:
        raise ConfigError(
            f"the table has {is_copy.sum()} copies of runs with equal sizes and loss: "
            f"{runs.names(is_copy)}; remove them, or set drop_duplicates in an analysis file."
        )
    return runs.select(~is_copy, f"dropped {is_copy.sum()} copies: {runs.names(is_copy)}")


def check_conventions(runs: Runs, group: str, extra: Sequence[str] = ()) -> None:
    """Raises ConfigError if runs that are fitted together differ in context or a convention.

    Args:
        group: what the runs have in common, for the message.
        extra: further columns that must have one value.
    """
    for name in ("context_length", *CONVENTIONS, *extra):
        if name not in runs.columns:
            continue
        column = runs.columns[name].astype(str)
        values = sorted(set(column) - {"", "nan"})
        if len(values) > 1:
            rare = min(values, key=lambda value: np.sum(column == value))  # noqa: B023
            raise ConfigError(
                f"runs of {group} must agree in {name}, got {', '.join(values[:5])} (such as "
                f"{runs.names(column == rare, 2)}); split them by `groups` or filter them in an "
                "analysis file."
            )
