"""Writing of one shard: drafts that are renamed when they are complete."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from xlstm_jax.data.shards.manifest import ShardInfo, shard_path

DRAFT = ".tmp"


class ShardWriter(contextlib.AbstractContextManager):
    """Writes the files of a shard in constant memory; `close` returns its record.

    Files have the suffix `.tmp` until `close`. Leaving the context without `close` deletes them.
    """

    def __init__(self, folder: Path, split: str, name: str, dtype: str, *, loss_mask: bool = False):
        self._name, self._dtype = name, np.dtype(dtype).newbyteorder("<")
        suffixes = (".bin", ".ends", ".loss") if loss_mask else (".bin", ".ends")
        (folder / split).mkdir(parents=True, exist_ok=True)
        self._paths = {suffix: folder / shard_path(split, name, suffix) for suffix in suffixes}
        self._files: dict[str, Any] = {}
        self._hashes = {suffix: hashlib.sha256() for suffix in suffixes}
        self._tokens = self._documents = self._num_bytes = 0
        self._last_end = 0

    def write(
        self,
        ids: Integer[np.ndarray, "N"],
        num_bytes: int,
        *,
        ends_document: bool,
        loss_mask: Bool[np.ndarray, "N"] | None = None,
    ) -> None:
        """Appends tokens of a document; `ids` of its last part end with the end-of-document token.

        Args:
            num_bytes: bytes of text that the tokens encode.
            ends_document: whether the document ends here.
            loss_mask: whether each token is a target of the loss; for a writer with `loss_mask`.
        """
        ends = np.array([len(ids)] if ends_document else [], np.int64)
        self.write_many(ids, num_bytes, ends, loss_mask=loss_mask)

    def write_many(
        self,
        ids: Integer[np.ndarray, "N"],
        num_bytes: int,
        ends: Integer[np.ndarray, "D"],
        *,
        loss_mask: Bool[np.ndarray, "N"] | None = None,
    ) -> None:
        """As `write`, for several documents; `ends` are positions in `ids`, as in a shard."""
        self._append(".bin", ids.astype(self._dtype))
        if loss_mask is not None:
            self._append(".loss", loss_mask.astype(np.uint8))
        if len(ends):
            self._append(".ends", (ends + self._tokens).astype("<u8"))
            self._last_end = self._tokens + int(ends[-1])
        self._tokens, self._num_bytes = self._tokens + len(ids), self._num_bytes + num_bytes
        self._documents += len(ends)

    def _append(self, suffix: str, array: np.ndarray) -> None:
        if suffix not in self._files:
            self._files[suffix] = open(f"{self._paths[suffix]}{DRAFT}", "wb", buffering=1 << 20)
        data = array.tobytes()
        self._files[suffix].write(data)
        self._hashes[suffix].update(data)

    def close(self) -> ShardInfo | None:
        """Renames the drafts; the record of the shard, or None (and no file) if it is empty."""
        files, self._files = self._files, {}
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for suffix in files:
            os.replace(f"{self._paths[suffix]}{DRAFT}", self._paths[suffix])
        if not files:
            return None
        assert self._last_end == self._tokens, "the last document has no end"
        return ShardInfo(
            name=self._name,
            tokens=self._tokens,
            documents=self._documents,
            num_bytes=self._num_bytes,
            sha256={suffix: self._hashes[suffix].hexdigest() for suffix in files},
        )

    def __exit__(self, *error: object) -> None:
        for suffix, file in self._files.items():
            file.close()
            Path(f"{self._paths[suffix]}{DRAFT}").unlink(missing_ok=True)
        self._files = {}
