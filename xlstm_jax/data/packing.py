"""Packing of documents into windows of T + 1 tokens, planned from the document ends only.

A document of more than T + 1 tokens is divided into pieces of T + 1, each of which begins with the
last token of the one before it, so that every token but the first of a document is the target of
exactly one window. Its rest is packed like a document.

Documents are packed in groups of consecutive ones. This bounds the memory of planning, and a window
takes its documents from one region of the store, of which few blocks are read.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer

from xlstm_jax import config
from xlstm_jax.data.shards.columns import Column
from xlstm_jax.data.shards.store import TokenStore
from xlstm_jax.errors import ConfigError, printable, quote_path

_log = logging.getLogger(__name__)

GROUP_WINDOWS = {"first_fit": 1 << 16, "best_fit": 1 << 8, "pad": 1 << 16}
"""Tokens of a group, in windows. First fit packs nearby documents even without groups; best fit
packs documents from anywhere in a group, which is therefore one block of remote data."""

OPEN_WINDOWS = 64
"""Windows that first fit may add documents to."""

MIN_CACHED = 1 << 20
"""From this number of documents on, a plan takes seconds and is stored on disk."""

_VERSION = 1  # of plans; change it with any change of what they contain
_HEADER = np.dtype([("sha256", "V32"), ("num_pieces", "<i8"), ("num_windows", "<i8")])


@runtime_checkable  # so that signatures can be checked at run time
class Layout(Protocol):
    """Which tokens each window has."""

    def __len__(self) -> int:
        """Number of windows."""

    def pieces(self, index: int) -> Sequence[tuple[int, int]]:
        """Ranges (start, stop) of positions of a window, in order; at most T + 1 in all."""


class Pieces(NamedTuple):
    """Ranges of positions, each within one document."""

    starts: Int64[np.ndarray, "P"]
    lengths: Int64[np.ndarray, "P"]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A `Layout` in arrays: window i has the pieces from `firsts[i]` up to `firsts[i + 1]`."""

    starts: Column | Integer[np.ndarray, "P"]  # int64
    lengths: Column | Integer[np.ndarray, "P"]  # uint32
    firsts: Column | Integer[np.ndarray, "bounds"]  # int64

    def __len__(self) -> int:
        """Number of windows."""
        firsts = self.firsts
        return (firsts.length if isinstance(firsts, Column) else len(firsts)) - 1

    def pieces(self, index: int) -> Sequence[tuple[int, int]]:
        """Ranges (start, stop) of positions of a window, in order."""
        first, last = _array(self.firsts)[index : index + 2]
        starts = _array(self.starts)[first:last]
        stops = starts + _array(self.lengths)[first:last]
        return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _array(values: Column | np.ndarray) -> np.ndarray:
    return values.array if isinstance(values, Column) else values


def make_layout(packing: str, store: TokenStore, seq_len: int, cache_dir: str | None) -> Layout:
    """The windows of a store, as a pure function of its document ends.

    Args:
        packing: "best_fit" (decreasing: the longest documents first, each into the fullest window
            that it fits), "first_fit" (in order, into the first of `OPEN_WINDOWS` windows that it
            fits) or "pad" (one document per window).
        seq_len: T.
        cache_dir: the folder for plans of many documents; None: that of the library.

    Raises:
        ConfigError: no document has two tokens, an input and a target.
    """
    folder = config.user_path(cache_dir) if cache_dir else config.cache_dir()
    if folder is None or store.num_documents < MIN_CACHED:
        return _make(packing, store, seq_len)
    path = folder / "packing" / _key(packing, store, seq_len)
    plan = _load(path)
    if plan is None:
        plan = _make(packing, store, seq_len)
        try:
            _save(path, plan)
        except OSError as error:
            reason = printable(error.strerror or str(error))
            _log.warning(
                "data.cache_dir: %s cannot be written (%s); the next run plans again",
                quote_path(path),
                reason,
            )
    return plan


def _key(packing: str, store: TokenStore, seq_len: int) -> str:
    """A hash of everything that a plan depends on."""
    settings = [_VERSION, packing, seq_len, GROUP_WINDOWS[packing], OPEN_WINDOWS]
    digest = hashlib.sha256(str(settings).encode())
    for bounds in _groups(store, GROUP_WINDOWS[packing] * seq_len):
        digest.update(bounds.tobytes())
    return digest.hexdigest()[:32]


def _load(path: Path) -> Plan | None:
    """The plan in a file, which is mapped; None if the file is absent or damaged."""
    try:
        header = np.fromfile(path, _HEADER, 1)
        if len(header) == 0:
            return None
        num_pieces, num_windows = int(header["num_pieces"][0]), int(header["num_windows"][0])
        if min(num_pieces, num_windows) < 1:
            return None
        if path.stat().st_size != _HEADER.itemsize + 12 * num_pieces + 8 * (num_windows + 1):
            return None
    except OSError:
        return None
    offset = _HEADER.itemsize
    starts = Column(str(path), "<i8", num_pieces, offset)
    firsts = Column(str(path), "<i8", num_windows + 1, offset + 8 * num_pieces)
    lengths = Column(str(path), "<u4", num_pieces, offset + 8 * (num_pieces + num_windows + 1))
    plan = Plan(starts, lengths, firsts)
    return plan if _digest(plan) == header["sha256"].tobytes() else None


def _save(path: Path, plan: Plan) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(1, _HEADER)
    header[0] = (_digest(plan), _array(plan.starts).size, len(plan))
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            for array in (header, *_columns(plan)):
                array.tofile(file)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _columns(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _array(plan.starts), _array(plan.firsts), _array(plan.lengths)


def _digest(plan: Plan) -> bytes:
    digest = hashlib.sha256()
    for array in _columns(plan):
        digest.update(array.data)
    return digest.digest()


def _groups(store: TokenStore, size: int) -> Iterator[Int64[np.ndarray, "bounds"]]:
    """For each range of `size` positions, the start of its first document and the ends of all."""
    start = 0
    for first in range(0, store.num_tokens, size):
        ends = store.ends(first, min(first + size, store.num_tokens))
        if ends.size:
            yield np.concatenate([[start], ends])
            start = int(ends[-1])


def _make(packing: str, store: TokenStore, seq_len: int) -> Plan:
    starts, lengths, counts = [], [], []
    for bounds in _groups(store, GROUP_WINDOWS[packing] * seq_len):
        pieces = _divide(bounds, seq_len)
        order, sizes = _by_window(_PACKINGS[packing](pieces.lengths, seq_len + 1))
        starts.append(pieces.starts[order])
        lengths.append(pieces.lengths[order].astype(np.uint32))
        counts.append(sizes)
    if not sum(map(len, counts)):
        raise ConfigError(
            "data.packing needs a document of at least two tokens, an input and a target, got "
            "none; add text."
        )
    firsts = np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)
    return Plan(np.concatenate(starts), np.concatenate(lengths), firsts)


def _divide(bounds: Int64[np.ndarray, "bounds"], seq_len: int) -> Pieces:
    """The pieces of documents, in order; documents of one token have no target and are dropped."""
    first, size = bounds[:-1], np.diff(bounds)
    first, size = first[size > 1], size[size > 1]
    counts = -(-(size - 1) // seq_len)  # one piece per T targets
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(first, counts) + number * seq_len
    lengths = np.minimum(np.repeat(first + size, counts) - starts, seq_len + 1)
    return Pieces(starts, lengths)


def _by_window(
    window: Int64[np.ndarray, "P"],
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "windows"]]:
    """The order of pieces by window, windows by their first piece, and the pieces of each."""
    _, first, inverse, sizes = np.unique(
        window, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(first), np.int64)
    by_first = np.argsort(first)
    rank[by_first] = np.arange(len(first))
    return np.argsort(rank[inverse], kind="stable"), sizes[by_first]


Pack = Callable[[Int64[np.ndarray, "P"], int], Int64[np.ndarray, "P"]]
"""The number of the window of each piece, from the lengths of pieces and the size of windows."""


def _pad(lengths: Int64[np.ndarray, "P"], size: int) -> Int64[np.ndarray, "P"]:
    return np.arange(len(lengths))


def _first_fit(lengths: Int64[np.ndarray, "P"], size: int) -> Int64[np.ndarray, "P"]:
    """First fit, in order, where `OPEN_WINDOWS` windows are open; the fullest one is closed.

    Source: Csirik and Johnson 2001, "Bounded space on-line bin packing: best is better than first".
    """
    free, names = [size] * OPEN_WINDOWS, list(range(OPEN_WINDOWS))
    window, num_windows = [], OPEN_WINDOWS
    for length in lengths.tolist():
        for slot in range(OPEN_WINDOWS):
            if free[slot] >= length:
                break
        else:
            slot = free.index(min(free))
            free[slot], names[slot] = size, num_windows
            num_windows += 1
        free[slot] -= length
        window.append(names[slot])
    return np.array(window, np.int64)


def _best_fit(lengths: Int64[np.ndarray, "P"], size: int) -> Int64[np.ndarray, "P"]:
    """Best fit decreasing: each piece goes into the window with the least space that suffices."""
    window = np.empty(len(lengths), np.int64)
    by_space: list[list[int]] = [[] for _ in range(size + 1)]  # open windows
    spaces = 0  # bit s is set if a window has space s: finds the next space in O(1)
    num_windows = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            name = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, name, num_windows = size, num_windows, num_windows + 1
        window[piece] = name
        if (left := space - length) > 1:  # one token has no target
            by_space[left].append(name)
            spaces |= 1 << left
    return window


_PACKINGS: dict[str, Pack] = {"first_fit": _first_fit, "best_fit": _best_fit, "pad": _pad}
