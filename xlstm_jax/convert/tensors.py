"""Tensors by name: from arrays or a folder of safetensors files, and into such a folder."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from xlstm_jax.config import ConfigError

INDEX = "model.safetensors.index.json"
READABLE = ("F64", "F32", "F16", "BF16")  # types a parameter may be stored in
STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class WeightsError(ConfigError):
    """Weights that are damaged or do not fit; the message lists all that is wrong with them."""


class Source(NamedTuple):
    """Tensors by name: the shapes of all, and what reads one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Source:
    """Tensors that are in memory already.

    Raises:
        WeightsError: some are no arrays of floating-point numbers; all are listed.
    """
    strange = []
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", type(array).__name__)
        # bfloat16 is not among NumPy's own kinds.
        if not isinstance(dtype, np.dtype) or (dtype.kind != "f" and dtype.name != "bfloat16"):
            strange.append(f"{name} ({dtype})")
    if strange:
        raise WeightsError(
            f"tensors must be arrays of floating-point numbers, got {', '.join(strange)}; "
            "convert them with `.float().numpy()` or leave them out."
        )
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    return Source(shapes, lambda name: np.asarray(arrays[name]))


def from_folder(folder: Path) -> Source:
    """The safetensors files of a folder.

    A file is mapped into memory for one tensor at a time: what has been read of it does not stay.

    Raises:
        WeightsError: there is no such file, one is damaged, or an index names what is not there.
    """
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files(folder):
        for name, shape in _header(file).items():
            if name in file_of:
                raise WeightsError(
                    f"tensor {name!r} must be in one file of {folder}, but is in "
                    f"{file_of[name].name} and {file.name}; keep one of them."
                )
            file_of[name], shapes[name] = file, shape

    def read(name: str) -> np.ndarray:
        with _open(file_of[name]) as file:
            return file.get_tensor(name)

    return Source(shapes, read)


def _files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():  # transformers reads no other then
        return [single]
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise WeightsError(
                f"{folder} has no model.safetensors and no {INDEX}; name a folder of weights in "
                "the safetensors format."
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if "" in map(str.strip, names) or not names:
            raise ValueError("files must be named by words")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(
            f"{index} must be JSON with a weight_map from tensors to files, but it cannot be read "
            f"({error!r}); fetch it again."
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} lacks {', '.join(missing)} of the {len(names)} files that {INDEX} names; "
            "fetch them again."
        )
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        for name, part in slices.items():
            if part.get_dtype() not in READABLE:
                raise WeightsError(
                    f"tensor {name!r} of {file} must be one of {', '.join(READABLE)}, got "
                    f"{part.get_dtype()}; convert it first."
                )
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def _open(file: Path) -> Any:
    safetensors = import_safetensors()
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} must be a whole safetensors file, but it is damaged or cut short "
            f"({error}); fetch it again."
        ) from error


def import_safetensors() -> Any:
    """The package, which is an extra."""
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ConfigError(
            "reading and writing weights of other implementations needs the package safetensors; "
            "install it with `pip install 'xlstm-jax[hf]'`."
        ) from error
    return safetensors


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
