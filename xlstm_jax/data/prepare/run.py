"""`prepare`: raw files to a folder of token shards, resumable and spread over machines."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_jax.config import import_module, user_path
from xlstm_jax.data import chat
from xlstm_jax.data.config import SPLITS
from xlstm_jax.data.documents import File, find_files
from xlstm_jax.data.prepare import folder, workers
from xlstm_jax.data.prepare.config import PrepareConfig, Share
from xlstm_jax.data.prepare.inputs import InputShard, input_shards, listing_sha256
from xlstm_jax.data.prepare.ledger import Entry, Ledger, read_entries
from xlstm_jax.data.prepare.progress import Counts, Progress, Totals
from xlstm_jax.data.shards.manifest import NAME, Manifest, ShardInfo, TokenizerInfo, token_dtype
from xlstm_jax.data.shards.open import kind_of
from xlstm_jax.data.tokenizers import Tokenizer, get
from xlstm_jax.errors import ConfigError, quote, quote_path


class Result(NamedTuple):
    """The state of the folder after `prepare`."""

    manifest: Manifest | None  # None: other processes have not finished their shares
    missing: int  # shards that others have not finished


def prepare(
    cfg: PrepareConfig,
    out: Path,
    *,
    shard: str = "0/1",
    num_workers: int | None = None,
    fresh: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Tokenizes raw files into `out`, where `data.source` finds them; see docs/data.md.

    Shards that a previous call finished are skipped. A call that is killed at any moment, and
    repeated, writes the same files.

    Args:
        shard: "I/N" for process I, from 0, of N that share the work.
        num_workers: processes; None: one for each core. One worker is this process itself.
        fresh: delete what is in `out` first.

    Raises:
        ConfigError: the input is invalid, or `out` has data of other settings.
        ChildProcessError: a worker died; the same call resumes.
    """
    share = Share.parse(shard)
    num_workers = _num_cores() if num_workers is None else num_workers
    if num_workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {num_workers}; leave it out.")
    if fresh and share.count > 1:
        raise ConfigError(
            "--fresh must not be combined with --shard, as it would delete the shards of others; "
            "delete the folder, then start all of them."
        )
    if kind := kind_of(cfg.source):
        raise ConfigError(
            f"IN must be raw text, but {quote_path(cfg.source)} has tokens already ({kind}); train "
            "on them with --data.source."
        )
    folder.check(cfg.source, out)
    for name in cfg.imports:
        import_module(name)
    tokenizer = get(cfg.tokenizer)
    files = find_files(cfg.source, cfg.pattern, split=cfg.split)
    settings, dtype = _settings(cfg, tokenizer, files), token_dtype(tokenizer.vocab_size)
    if fresh:
        folder.clear(out)
    _finished(out, settings, dtype)  # before `out` is changed
    shards = input_shards(files)
    with Ledger(out, share) as ledger:
        entries = _finished(out, settings, dtype)
        mine = shards[share.index :: share.count]
        todo = [shard for shard in mine if shard.number not in entries]
        progress = Totals(mine, todo, on_progress)
        with contextlib.closing(_messages(cfg, out, todo, num_workers)) as messages:
            for done, message in messages:
                if isinstance(message, Counts):
                    progress.add(done, message)
                else:
                    ledger.append(_entry(done, message, settings))
                    progress.finish(done)
        # Again: other processes have finished shards meanwhile.
        entries = _finished(out, settings, dtype)
        if missing := len(shards) - len(entries):
            return Result(None, missing)
        manifest = _manifest(cfg, tokenizer, files, settings, entries)
        if not (out / NAME).exists():
            folder.write_manifest(out, manifest, tokenizer, share)
        return Result(manifest, 0)


def _entry(shard: InputShard, shards: dict[str, ShardInfo], settings: dict[str, Any]) -> Entry:
    files = tuple((file.name, file.size) for file in shard.files)
    return Entry(number=shard.number, files=files, shards=shards, settings=settings)


def _num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _settings(cfg: PrepareConfig, tokenizer: Tokenizer, files: Sequence[File]) -> dict[str, Any]:
    """All that tokens depend on, as JSON."""
    fields = {
        "files_sha256": listing_sha256(files),  # of their names and sizes
        "pattern": cfg.pattern,
        "split": cfg.split,
        "tokenizer_sha256": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
    }
    if not cfg.chat:
        return fields | {"text_field": cfg.text_field}
    template = chat.load(cfg.tokenizer)
    identity = json.dumps([template.source, dict(template.variables)], sort_keys=True)
    return fields | {
        "messages_field": cfg.messages_field,
        "template_sha256": hashlib.sha256(identity.encode()).hexdigest(),
    }


def _finished(out: Path, settings: Mapping[str, Any], dtype: str) -> dict[int, Entry]:
    """The finished shards in a folder; raises ConfigError if one was made by other settings."""
    entries = read_entries(out)
    for entry in entries.values():
        before = entry.settings
        changes = [
            f"{name} was {quote(before.get(name))} and is {quote(settings.get(name))}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changes:
            raise ConfigError(
                f"{quote_path(out)} was prepared in another way: {', '.join(changes)}; repeat the "
                "command of then, choose another folder, or discard its data with --fresh."
            )
    if not entries and (out / NAME).exists():
        raise ConfigError(
            f"{quote_path(out)} has a {NAME} but no ledger/, so that its shards cannot be resumed; "
            "choose another folder, or discard its data with --fresh."
        )
    return {n: entry for n, entry in entries.items() if folder.is_complete(out, entry, dtype)}


def _messages(
    cfg: PrepareConfig, out: Path, todo: Sequence[InputShard], num_workers: int
) -> workers.Messages:
    """Counts and records of the shards; with fewer shards than cores, workers use more threads."""
    processes = max(1, min(num_workers, len(todo)))
    job = workers.Job(cfg, out, num_workers // processes)
    if num_workers == 1:
        return workers.run_here(job, todo)
    return workers.run_in_processes(job, todo, processes)


def _manifest(
    cfg: PrepareConfig,
    tokenizer: Tokenizer,
    files: Sequence[File],
    settings: dict[str, Any],
    entries: Mapping[int, Entry],
) -> Manifest:
    ordered = [entries[number] for number in sorted(entries)]
    shards = {
        split: tuple(e.shards[split] for e in ordered if split in e.shards) for split in SPLITS
    }
    if not any(shards.values()):
        raise ConfigError(
            f"{quote(cfg.source)} contains no text: its {len(files)} files are empty; add text."
        )
    size = sum(file.size for file in files)
    # Only the name: machines may mount the folder under different paths.
    source = {"name": user_path(cfg.source).resolve().name, "files": len(files), "size": size}
    return Manifest(
        tokenizer=TokenizerInfo(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        ),
        dtype=token_dtype(tokenizer.vocab_size),
        sources=source | settings,
        splits={split: infos for split, infos in shards.items() if infos},
    )
