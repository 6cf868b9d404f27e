"""Stores of tokens by path: prepared data, and tokens of Megatron-LM and datatrove."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from xlstm_jax import config
from xlstm_jax.data.config import SPLITS
from xlstm_jax.data.shards import datatrove, manifest, megatron, remote, verify
from xlstm_jax.data.shards.blocks import BlockCache, BlockedTokens
from xlstm_jax.data.shards.columns import Column
from xlstm_jax.data.shards.manifest import ShardInfo, TokenizerInfo, shard_path
from xlstm_jax.data.shards.store import Shard, ShardedTokens, StoreRange, TokenStore
from xlstm_jax.errors import ConfigError, quote

Kind = Literal["prepared", "megatron", "datatrove"]

ALL = "all"
"""Given as the name of a split: the documents of all splits."""

# The suffix of the file that names a shard, and the function that reads it.
_FOREIGN: dict[str, tuple[str, Callable[[str], Shard]]] = {
    "megatron": (megatron.SUFFIX, megatron.read_shard),
    "datatrove": (datatrove.SUFFIX, datatrove.read_shard),
}
_SAMPLE = 4096  # tokens of each file that identify the content, beside the ends of documents
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_MAX_TOKENIZER = 1 << 28  # bytes of one of these files


class Opened(NamedTuple):
    """One split of tokenized data."""

    store: TokenStore
    tokenizer: TokenizerInfo | None  # None: the format stores none
    tokenizer_path: str | None  # of a local folder
    num_bytes: int | None  # of text
    description: dict[str, Any]  # JSON values that identify the content wherever it is


def kind_of(path: str) -> Kind | None:
    """The format of tokenized data at a path or URL; None for raw files, or if it is absent."""
    if not remote.is_url(path):
        try:
            os.lstat(os.path.expanduser(path))
        except FileNotFoundError:  # maybe a prefix
            pass
        except (OSError, ValueError):  # a path that cannot exist
            return None
        if os.path.expanduser(path).startswith("~"):  # no such user
            return None
    path = _normalize(path)
    if _is_prepared(path):
        return "prepared"
    if any(_stems(path, megatron.SUFFIX).values()):
        return "megatron"
    return "datatrove" if any(_stems(path, datatrove.SUFFIX).values()) else None


def _normalize(path: str) -> str:
    return (path if remote.is_url(path) else str(config.user_path(path))).rstrip("/") or "/"


def _is_prepared(path: str) -> bool:
    """Whether a folder has our manifest, or, if it is local, shards that wait for one."""
    try:
        data = remote.read_bytes(f"{path}/{manifest.NAME}", manifest.MAX_BYTES)
        if b'"splits"' in data and b'"tokenizer"' in data:  # also if it is damaged
            return True
    except FileNotFoundError:
        pass
    folders = [] if remote.is_url(path) else [f"{path}/{split}" for split in SPLITS]
    return any(name.endswith(".ends") for f in folders for name in remote.list_files(f))


def _stems(path: str, suffix: str) -> dict[str, list[str]]:
    """Paths, without the suffix, of the files of a format, by split; "" if they name no split."""
    stem = path.removesuffix(suffix)
    stem = stem.removesuffix(".bin") if suffix == megatron.SUFFIX else stem
    if not os.path.isdir(path) and remote.file_size(f"{stem}{suffix}") is not None:
        return {"": [stem]}
    names = [name for name in remote.list_files(path) if name.endswith(suffix)]
    stems = {"": [f"{path}/{name.removesuffix(suffix)}" for name in names]}
    for split in SPLITS:
        inside = [n for n in remote.list_files(f"{path}/{split}") if n.endswith(suffix)]
        stems[split] = [f"{path}/{split}/{name.removesuffix(suffix)}" for name in inside]
        if f"{split}{suffix}" in names:
            stems[split].append(f"{path}/{split}")
    return stems


def open_tokens(
    path: str,
    split: str,
    *,
    verify: str = "auto",
    cache_dir: str | None = None,
    block_len: int,
    max_blocks: int,
) -> Opened:
    """One split of tokenized data at a path or URL, or `ALL`. Local files are mapped.

    Data of other tools have the splits that their folders or files name (train/, valid.idx), else
    the last twentieth of the documents is "test" and the one before it is "valid".

    Args:
        verify: "size", "full" or "auto" of `verify_files`, for prepared data.
        cache_dir: a local folder that keeps blocks of remote data; None keeps none.
        block_len: tokens that one request for remote data reads.
        max_blocks: blocks of remote data in memory.

    Raises:
        ConfigError: the data or the split do not exist, or files are damaged.
    """
    path, kind = _normalize(path), kind_of(path)
    if kind is None:
        raise ConfigError(
            f"data.source={remote.shown(path)} must be a folder of `xlstm-jax data prepare`, a "
            "prefix of Megatron-LM (.bin and .idx) or a folder of datatrove (.ds and .ds.index)."
        )
    if kind == "prepared":
        opened = _open_prepared(path, split, verify)
    else:
        opened = _open_foreign(path, split, kind)
    if not remote.is_url(path):
        return opened
    folder = config.user_path(cache_dir) if cache_dir else None
    cache = folder and _block_cache(folder / "blocks", opened, block_len)
    store = BlockedTokens(opened.store, block_len, max_blocks, cache)
    folder = folder or config.cache_dir() or Path(tempfile.gettempdir())
    tokenizer_path = opened.tokenizer_path and _copy_tokenizer(opened, folder / "tokenizers")
    return opened._replace(store=store, tokenizer_path=tokenizer_path)


def _open_prepared(path: str, split: str, mode: str) -> Opened:
    prepared = manifest.read_manifest(path)
    chosen = {s: infos for s, infos in prepared.splits.items() if infos and split in (s, ALL)}
    if not chosen:
        counts = {name: sum(i.documents for i in s) for name, s in prepared.splits.items() if s}
        raise _no_split(path, split, counts, "prepare it with `xlstm-jax data prepare --split`")
    verify.verify_files(path, chosen, prepared.dtype, mode)
    infos = [info for part in chosen.values() for info in part]
    store = ShardedTokens(
        [_shard(path, s, info, prepared.dtype) for s, part in chosen.items() for info in part]
    )
    remote.in_threads(verify.verify_ends, store.shards, is_remote=remote.is_url(path))
    tokenizer, num_bytes = prepared.tokenizer, sum(info.num_bytes for info in infos)
    description = _describe("prepared", split, store, [info.sha256 for info in infos]) | {
        "num_bytes": num_bytes,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
    }
    folder = None if tokenizer.name == "byte" else f"{path}/{manifest.TOKENIZER_FOLDER}"
    return Opened(store, tokenizer, folder, num_bytes, description)


def _shard(path: str, split: str, info: ShardInfo, dtype: str) -> Shard:
    stem = f"{path}/{shard_path(split, info.name, '')}"
    tokens = remote.column(f"{stem}.bin", np.dtype(dtype).newbyteorder("<").str, info.tokens)
    ends = remote.column(f"{stem}.ends", "<u8", info.documents)
    has_mask = ".loss" in info.sha256
    return Shard(
        tokens, ends, remote.column(f"{stem}.loss", "|u1", info.tokens) if has_mask else None
    )


def _open_foreign(path: str, split: str, kind: Kind) -> Opened:
    suffix, read_shard = _FOREIGN[kind]
    stems = _stems(path, suffix)
    named = {s: stems[s] for s in SPLITS if stems.get(s)}
    if named and split not in (*named, ALL):
        counts = {name: len(files) for name, files in named.items()}
        raise _no_split(path, split, counts, "add a folder of this name")
    files = [stem for part in named.values() for stem in part] if split == ALL else named.get(split)
    files = files or stems[""]
    shards = list(map(read_shard, files))
    if len(sizes := {shard.tokens.dtype for shard in shards}) > 1:
        raise ConfigError(
            f"data.source={remote.shown(path)} must have files with tokens of one size, got "
            f"{', '.join(sorted(sizes))}; they are of several tokenizers: separate them."
        )
    sharded = ShardedTokens(shards)
    store = sharded if named or split == ALL else _share(sharded, path, split)
    return Opened(store, None, None, None, _describe(kind, split, store, map(_identify, shards)))


def _identify(shard: Shard) -> str:
    """A hash of the ends of documents and of the first tokens."""
    ends = shard.ends.array if isinstance(shard.ends, Column) else shard.ends
    digest = hashlib.sha256(np.ascontiguousarray(ends, "<i8").data)
    digest.update(shard.tokens.read(0, min(_SAMPLE, shard.tokens.length)).tobytes())
    return digest.hexdigest()


def _share(store: ShardedTokens, path: str, split: str) -> StoreRange:
    """The documents of a split of data that name none: by position, 90/5/5."""
    count, share = store.num_documents, max(1, store.num_documents // 20)
    if count < len(SPLITS):
        raise _no_split(path, split, {"all": count}, "it needs three, or folders named by split")
    bounds = [0, count - 2 * share, count - share, count]
    positions = [store.document_end(bound - 1) if bound else 0 for bound in bounds]
    number = SPLITS.index(split)
    return StoreRange(store, positions[number], positions[number + 1])


def _no_split(path: str, split: str, counts: dict[str, int], remedy: str) -> ConfigError:
    known = ", ".join(f"{count:,} in {name}" for name, count in counts.items()) or "none"
    return ConfigError(
        f"data.source={remote.shown(path)} must have documents for split={quote(split)}, but has "
        f"{known}; {remedy}."
    )


def _describe(
    kind: Kind, split: str, store: TokenStore, identities: Iterable[Any]
) -> dict[str, Any]:
    return {
        "format": kind,
        "content_sha256": _hash(list(identities)),
        "split": split,
        "num_documents": store.num_documents,
        "num_tokens": store.num_tokens,
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _block_cache(folder: Path, opened: Opened, block_len: int) -> BlockCache:
    first = opened.store.read(0, 1)
    has_mask = opened.store.loss_mask(0, 1) is not None
    return BlockCache(
        folder / _hash([opened.description, block_len])[:32], first.dtype.str, has_mask
    )


def _copy_tokenizer(opened: Opened, folder: Path) -> str:
    """A local copy of the tokenizer of remote data; its reader compares the checksum."""
    # The hash of a hash, which in a damaged manifest could be any path.
    folder = folder / _hash(opened.description["tokenizer_sha256"])[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        try:
            data = remote.read_bytes(f"{opened.tokenizer_path}/{name}", _MAX_TOKENIZER)
        except FileNotFoundError:
            continue
        draft = folder / f"{name}.{os.getpid()}.tmp"
        draft.write_bytes(data)
        os.replace(draft, folder / name)
    return str(folder)
