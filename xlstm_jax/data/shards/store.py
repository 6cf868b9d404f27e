"""One index space over the tokens of many shards."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt

from xlstm_jax.data.shards.columns import Column
from xlstm_jax.errors import ConfigError, quote_path


@runtime_checkable  # so that signatures can be checked at run time
class TokenStore(Protocol):
    """Tokens of many documents, each document ended by the end-of-document token.

    Positions count from 0 over all documents. A document occupies the positions from the end of
    the one before it up to its own end, exclusive.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens, with those that end documents."""

    @property
    def num_documents(self) -> int:
        """Documents, at least one."""

    def read(self, start: int, stop: int) -> UInt[np.ndarray, "N"]:
        """The tokens at positions start..stop - 1."""

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """The ends of documents among start + 1..stop, in order."""

    def loss_mask(self, start: int, stop: int) -> Bool[np.ndarray, "N"] | None:
        """Whether each token is a target of the loss; None if all are."""


def check_range(num_tokens: int, start: int, stop: int) -> None:
    """Raises ConfigError unless start..stop is a range of at least one position of a store."""
    if not 0 <= start < stop <= num_tokens:
        raise ConfigError(f"positions must be in 0..{num_tokens}, got {start}..{stop}; read less.")


class Shard(NamedTuple):
    """The columns of a shard; ends count from its own first token."""

    tokens: Column
    ends: Column | Integer[np.ndarray, "N"]
    loss_mask: Column | None = None


@dataclasses.dataclass(frozen=True)
class ShardedTokens:
    """The tokens of shards, in order, as a `TokenStore`."""

    shards: Sequence[Shard]

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards}

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The position of the first token of every shard, and of the end."""
        return [0, *itertools.accumulate(shard.tokens.length for shard in self.shards)]

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return self._starts[-1]

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(
            ends.length if isinstance(ends, Column) else len(ends) for _, ends, _ in self.shards
        )

    def read(self, start: int, stop: int) -> UInt[np.ndarray, "N"]:
        """The tokens at positions start..stop - 1, of one shard or of several."""
        pieces = [
            shard.tokens.read(first, last) for shard, _, first, last in self._parts(start, stop)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def loss_mask(self, start: int, stop: int) -> Bool[np.ndarray, "N"] | None:
        """Whether each token is a target of the loss; None if no shard has a mask."""
        if all(shard.loss_mask is None for shard in self.shards):
            return None
        pieces = [
            np.ones(last - first, np.bool_)
            if shard.loss_mask is None
            else shard.loss_mask.read(first, last) > 0
            for shard, _, first, last in self._parts(start, stop)
        ]
        return np.concatenate(pieces)

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """The ends of documents among start + 1..stop, in order.

        Raises:
            ConfigError: the ends of a shard are not in order.
        """
        pieces = []
        for shard, offset, first, last in self._parts(start, stop):
            ends = shard.ends.array if isinstance(shard.ends, Column) else shard.ends
            low, high = np.searchsorted(ends, np.array([first, last], ends.dtype), side="right")
            piece = np.asarray(ends[low:high], np.int64)
            inside = piece.size == 0 or first < piece[0] <= piece[-1] <= last
            if not (inside and (piece[1:] > piece[:-1]).all()):
                raise ConfigError(
                    f"the ends of documents beside {quote_path(shard.tokens.path)} must increase, "
                    f"but they do not near {piece[0]:,}; prepare the data again."
                )
            pieces.append(piece + offset)
        return np.concatenate(pieces)

    def document_end(self, number: int) -> int:
        """The end of a document by its number, which must exist."""
        for shard, offset in zip(self.shards, self._starts, strict=False):
            ends = shard.ends.array if isinstance(shard.ends, Column) else shard.ends
            if number < len(ends):
                return offset + int(ends[number])
            number -= len(ends)
        raise IndexError(number)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """(shard, position of its first token, first, last) of each shard with a part of a range.

        `first` and `last` count from the first token of the shard.
        """
        check_range(self.num_tokens, start, stop)
        number = bisect.bisect_right(self._starts, start) - 1
        while number < len(self.shards) and (offset := self._starts[number]) < stop:
            shard = self.shards[number]
            first, last = max(start - offset, 0), min(stop - offset, shard.tokens.length)
            if first < last:
                yield shard, offset, first, last
            number += 1


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayTokens:
    """Tokens in memory as a `TokenStore`."""

    tokens: UInt[np.ndarray, "N"]
    document_ends: Int64[np.ndarray, "D"]

    @property
    def num_tokens(self) -> int:
        """Tokens, with those that end documents."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_ends)

    def read(self, start: int, stop: int) -> UInt[np.ndarray, "N"]:
        """The tokens at positions start..stop - 1."""
        return self.tokens[start:stop]

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """The ends of documents among start + 1..stop, in order."""
        low, high = np.searchsorted(self.document_ends, [start, stop], side="right")
        return self.document_ends[low:high]

    def loss_mask(self, start: int, stop: int) -> Bool[np.ndarray, "N"] | None:
        """None: every token is a target of the loss."""
        return None


@dataclasses.dataclass(frozen=True)
class StoreRange:
    """The documents at the positions start..stop - 1 of a store, as a `TokenStore`."""

    store: TokenStore
    start: int
    stop: int

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "start": self.start, "stop": self.stop}

    @property
    def num_tokens(self) -> int:
        """Tokens of the range."""
        return self.stop - self.start

    @functools.cached_property
    def _num_documents(self) -> int:
        return len(self.ends(0, self.num_tokens))

    @property
    def num_documents(self) -> int:
        """Documents of the range."""
        return self._num_documents

    def read(self, start: int, stop: int) -> UInt[np.ndarray, "N"]:
        """The tokens at positions start..stop - 1 of the range."""
        check_range(self.num_tokens, start, stop)
        return self.store.read(self.start + start, self.start + stop)

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """The ends of documents among start + 1..stop, in order."""
        check_range(self.num_tokens, start, stop)
        return self.store.ends(self.start + start, self.start + stop) - self.start

    def loss_mask(self, start: int, stop: int) -> Bool[np.ndarray, "N"] | None:
        """Whether each token is a target of the loss; None if all are."""
        check_range(self.num_tokens, start, stop)
        return self.store.loss_mask(self.start + start, self.start + stop)
