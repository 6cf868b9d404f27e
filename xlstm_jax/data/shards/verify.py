"""Verification of prepared data against their manifest."""

import logging
import time
from collections.abc import Iterable, Mapping

from xlstm_jax.data.shards import remote
from xlstm_jax.data.shards.columns import Column
from xlstm_jax.data.shards.manifest import ShardInfo, file_sizes, shard_path
from xlstm_jax.data.shards.store import Shard
from xlstm_jax.errors import ConfigError

_log = logging.getLogger(__name__)

MAX_AUTO = 1 << 28
"""Bytes of a split up to which "auto" verifies checksums, unless they are remote."""

_LOG_SECONDS = 10.0


def verify_files(
    folder: str, splits: Mapping[str, Iterable[ShardInfo]], dtype: str, verify: str
) -> None:
    """Compares the files of splits with their manifest.

    Args:
        verify: "size" compares sizes, "full" also SHA-256 of all files, and "auto" is "full" for
            at most `MAX_AUTO` bytes of local files.

    Raises:
        ConfigError: a file is absent or differs; names the file.
    """
    expected = {
        f"{folder}/{shard_path(split, info.name, suffix)}": (size, info.sha256[suffix])
        for split, infos in splits.items()
        for info in infos
        for suffix, size in file_sizes(info, dtype).items()
    }
    for path, size in zip(expected, remote.file_sizes(expected), strict=True):
        if size != expected[path][0]:
            problem = "is absent" if size is None else f"has {size:,}"
            raise ConfigError(
                f"{remote.shown(path)} must have {expected[path][0]:,} bytes according to the "
                f"manifest, but it {problem}; copy the data again, or prepare them again."
            )
    total = sum(size for size, _ in expected.values())
    if verify == "full" or (verify == "auto" and total <= MAX_AUTO and not remote.is_url(folder)):
        _verify_checksums(expected, total)


def _verify_checksums(expected: dict[str, tuple[int, str]], total: int) -> None:
    done, logged = 0, time.monotonic()
    for path, (size, sha256) in expected.items():
        if remote.sha256(path) != sha256:
            raise ConfigError(
                f"{remote.shown(path)} must have the SHA-256 {sha256[:16]}... of the manifest, but "
                "its content differs; copy the data again, or prepare them again."
            )
        done += size
        if time.monotonic() > logged + _LOG_SECONDS:
            logged = time.monotonic()
            _log.info("verified %.1f of %.1f GB", done / 1e9, total / 1e9)


def verify_ends(shard: Shard) -> None:
    """Raises ConfigError unless the documents of a shard follow each other and end with its tokens.

    Of remote ends only the last one is read, in one request.
    """
    ends = shard.ends
    assert isinstance(ends, Column)
    last = int(ends.read(ends.length - 1, ends.length)[0])
    if last != shard.tokens.length:
        raise ConfigError(
            f"the last document of {remote.shown(ends.path)} must end at token "
            f"{shard.tokens.length:,}, the last one, but ends at {last:,}; prepare the data again."
        )
    if remote.is_url(ends.path):
        return
    array = ends.array
    if not ((array > 0).all() and (array[1:] > array[:-1]).all()):
        raise ConfigError(
            f"the ends of documents in {remote.shown(ends.path)} must increase, but they do not; "
            "copy the data again, or prepare them again."
        )
