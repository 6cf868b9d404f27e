"""Reading of remote tokens in blocks, which are cached in memory and optionally on disk."""

import collections
import dataclasses
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt

from xlstm_jax.data.shards.store import TokenStore, check_range
from xlstm_jax.errors import printable, quote_path

_log = logging.getLogger(__name__)


class Block(NamedTuple):
    """Consecutive tokens of a store."""

    tokens: UInt[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"] | None


@dataclasses.dataclass(frozen=True)
class BlockCache:
    """Blocks of one store in the files of a folder; processes may share it."""

    folder: Path  # named by the content of the store
    dtype: str  # of tokens
    has_mask: bool

    def load(self, number: int, length: int) -> Block | None:
        """A block of `length` tokens; None if it is absent or of another length."""
        path, item = self.folder / str(number), np.dtype(self.dtype).itemsize
        try:
            if path.stat().st_size != length * (item + self.has_mask):
                return None
            data = path.read_bytes()
        except OSError:
            return None
        tokens = np.frombuffer(data, self.dtype, length)
        mask = np.frombuffer(data, np.uint8, offset=length * item) > 0 if self.has_mask else None
        return Block(tokens, mask)

    def save(self, number: int, block: Block) -> None:
        """Writes a draft and renames it, so that a file is always complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{number}.{os.getpid()}.{threading.get_ident()}.tmp"
        mask = b"" if block.loss_mask is None else block.loss_mask.tobytes()
        try:
            draft.write_bytes(block.tokens.astype(self.dtype, copy=False).tobytes() + mask)
            os.replace(draft, self.folder / str(number))
        finally:
            draft.unlink(missing_ok=True)


class BlockedTokens:
    """A `TokenStore` that reads another one in blocks and caches those used last.

    A block has one token more than `block_len`, the last target of its last window, so that all
    its windows need one request. Threads may share an instance; a copy in another process starts
    with no blocks.
    """

    def __init__(
        self, store: TokenStore, block_len: int, max_blocks: int, cache: BlockCache | None = None
    ):
        self._arguments = store, block_len, max_blocks, cache
        self._store, self._block_len, self._max_blocks, self._cache = self._arguments
        self._lock = threading.Lock()
        # Futures, so that threads wait for a block that another one reads.
        self._blocks: collections.OrderedDict[int, Future[Block]] = collections.OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    @property
    def num_tokens(self) -> int:
        """Tokens of the store."""
        return self._store.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents of the store."""
        return self._store.num_documents

    def ends(self, start: int, stop: int) -> Int64[np.ndarray, "N"]:
        """The ends of documents among start + 1..stop, in order."""
        return self._store.ends(start, stop)

    def read(self, start: int, stop: int) -> UInt[np.ndarray, "N"]:
        """The tokens at positions start..stop - 1."""
        pieces = [block.tokens[part] for block, part in self._parts(start, stop)]
        return np.concatenate(pieces)

    def loss_mask(self, start: int, stop: int) -> Bool[np.ndarray, "N"] | None:
        """Whether each token is a target of the loss; None if all are."""
        masks = []
        for block, part in self._parts(start, stop):
            if block.loss_mask is None:
                return None
            masks.append(block.loss_mask[part])
        return np.concatenate(masks)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Block, slice]]:
        """The blocks of a range, and the part of each that belongs to it."""
        check_range(self.num_tokens, start, stop)
        while start < stop:
            number = start // self._block_len
            offset = number * self._block_len
            last = min(stop, offset + self._block_len + 1)
            yield self._block(number), slice(start - offset, last - offset)
            start = last

    def _block(self, number: int) -> Block:
        with self._lock:
            future = self._blocks.get(number)
            if is_new := future is None:
                future = self._blocks[number] = Future()
            self._blocks.move_to_end(number)
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        if is_new:
            try:
                future.set_result(self._read_block(number))
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(number, None)  # the next call tries again
                future.set_exception(error)
        return future.result()

    def _read_block(self, number: int) -> Block:
        start = number * self._block_len
        stop = min(start + self._block_len + 1, self.num_tokens)
        cache = self._cache
        if cache is not None and (block := cache.load(number, stop - start)):
            return block
        block = Block(self._store.read(start, stop), self._store.loss_mask(start, stop))
        if cache is not None:
            try:
                cache.save(number, block)
            except OSError as error:
                self._disable_cache(cache, error)
        return block

    def _disable_cache(self, cache: BlockCache, error: OSError) -> None:
        with self._lock:
            is_first, self._cache = self._cache is not None, None
        if is_first:
            reason = printable(error.strerror or str(error))
            _log.warning(
                "data.cache_dir: %s cannot be written (%s); blocks are read again from the source",
                quote_path(cache.folder),
                reason,
            )
