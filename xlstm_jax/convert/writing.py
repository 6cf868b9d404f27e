"""Writing tensors into safetensors files, so that a folder that has a config has all of them."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.convert.tensors import INDEX, import_safetensors

STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    max_shard_bytes: int,
    files: Mapping[str, str],
) -> None:
    """Writes tensors, and texts beside them; the host holds one file's tensors at a time.

    Arguments and errors are those of `hf.save_hf`; `files` are name -> text.
    """
    if dtype not in STORED:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(STORED)}; use float32.")
    if max_shard_bytes < 1:
        raise ConfigError(
            f"max_shard_bytes must be at least 1, got {max_shard_bytes}; 5e9 is usual."
        )
    check_free(folder, files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    draft.chmod(0o755)  # as other folders are, not for its owner alone
    try:
        _write_shards(draft, tensors, STORED[dtype], max_shard_bytes)
        for name, text in files.items():
            (draft / name).write_text(text)
        if not folder.exists():
            os.replace(draft, folder)
            return
        # The config comes last: without it nobody takes the folder for a whole one.
        for path in sorted(draft.iterdir(), key=lambda path: path.name in files):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_free(folder: Path, files: Iterable[str] = ("config.json",)) -> None:
    """Raises ConfigError where weights, or one of these files, stand in the folder already."""
    taken = [*folder.glob("*.safetensors*"), *(p for f in files if (p := folder / f).exists())]
    if folder.is_file() or taken:
        raise ConfigError(
            f"folder={str(folder)!r} must be new or hold no weights, but "
            + (f"{taken[0].name} is there" if taken else "it is a file")
            + "; name another one."
        )


def _write_shards(
    draft: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: np.dtype, limit: int
) -> None:
    safetensors = import_safetensors()
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    total = 0

    def write_batch() -> None:
        # PyTorch's readers ask for this word.
        file = draft / f"{len(shards)}.part"
        safetensors.numpy.save_file(batch, file, metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, array in tensors:
        array = np.asarray(array).astype(dtype, copy=False)
        if batch and array.nbytes + sum(other.nbytes for other in batch.values()) > limit:
            write_batch()
        batch[name] = array
        total += array.nbytes
    write_batch()
    if len(shards) == 1:
        os.replace(draft / "0.part", draft / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(draft / f"{number}.part", draft / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n")
