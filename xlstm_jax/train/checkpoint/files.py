"""Folders of checkpoints: complete ones, drafts, and errors of the store and the disk."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint.experimental.v1 as ocp

from xlstm_jax.config import ConfigError
from xlstm_jax.train import manifest

FOLDER = "checkpoints"
PARAMS_ONLY = {"params_alone": True}  # stored instead of the progress
_DRAFT = r"\d+(\.tmp)?(\.orbax-checkpoint-tmp.*)?$"


class CheckpointError(ConfigError):
    """A checkpoint is missing or unreadable. The message is one line that includes a remedy."""


def steps(run_dir: str | Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first."""
    folders = (Path(run_dir) / FOLDER).glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal() and path.is_dir())


def latest_step(run_dir: str | Path, at_most: int | None = None) -> int | None:
    """The newest step with a complete checkpoint, at most `at_most`; None without any."""
    saved = steps(run_dir)
    return max((step for step in saved if at_most is None or step <= at_most), default=None)


def draft_of(folder: Path) -> Path:
    """The folder that becomes `folder` when it is complete."""
    return folder.with_name(f"{folder.name}.tmp")


def find_drafts(folder: Path) -> list[Path]:
    """Incomplete checkpoints: STEP.tmp, and the temporary folders of the store."""
    return sorted(p for p in folder.glob("*.*tmp*") if re.match(_DRAFT, p.name) and p.is_dir())


def publish(folder: Path) -> None:
    """Completes a checkpoint: the manifest and all items appear with one rename."""
    manifest.write(draft_of(folder))
    os.replace(draft_of(folder), folder)


def delete(*folders: Path) -> None:
    """Deletes checkpoints, after renaming each to a draft: a partly deleted one must not load."""
    for folder in folders:
        draft = folder if folder.name.count(".") else draft_of(folder)
        with contextlib.suppress(OSError):
            os.replace(folder, draft)
        shutil.rmtree(draft, ignore_errors=True)


def delete_all(run_dir: Path) -> None:
    """Deletes the checkpoints of a run, complete or not, and their folder if it is then empty."""
    folder = run_dir / FOLDER
    delete(*(folder / str(step) for step in reversed(steps(run_dir))), *find_drafts(folder))
    with contextlib.suppress(OSError):
        folder.rmdir()


def store_context() -> ocp.Context:
    """The settings of the store for one operation."""
    logging.getLogger("absl").addFilter(_is_not_raised)  # `logging` adds a filter once
    registry = ocp.handlers.local_registry()
    for name in ("data", "config"):  # orbax would read them as trees of arrays
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    # Compression saves a tenth of the size, for four times the time and a copy of every array.
    context.array.saving.use_compression = False
    return context


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Drops tracebacks that threads of the store log for errors which are also raised."""
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises `OSError` for failures of the disk, which the array store reports as text only."""
    try:
        yield
    except Exception as error:
        number = os_error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def os_error_number(error: BaseException | None) -> int | None:
    """The errno of the disk failure that caused an error; None if it has another cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"\[os_error_code='(\d+)'", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None
