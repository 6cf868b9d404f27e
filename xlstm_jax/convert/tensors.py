"""Where tensors come from: a dict of arrays, or a folder of safetensors files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax.config import ConfigError

INDEX = "model.safetensors.index.json"
READABLE = ("F64", "F32", "F16", "BF16")  # types a parameter may be stored in


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
