"""Named tensors: reads arrays or a folder of safetensors files, and writes such a folder."""

import fnmatch
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from xlstm_jax.config.files import read_json
from xlstm_jax.convert.fields import Fields, check_size, first_of
from xlstm_jax.errors import ConfigError, import_optional, printable, quote, quote_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 10**7  # that of 100,000 tensors
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
READABLE_DTYPES = ("F64", "F32", "F16", "BF16")  # in the notation of safetensors
STORAGE_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

MAX_UNKNOWN_BLOCKS = 100
"""Blocks of a config whose weights have other names."""

_BLOCK = re.compile(r"(?<![^.])(?:blocks|layers)\.([0-9]+)\.")  # in the name of a tensor


class WeightsError(ConfigError):
    """Weights are corrupt or do not match the config; the message names the first problems."""


class WeightsWarning(UserWarning):
    """Weights have values that are NaN or infinite."""


class Source(NamedTuple):
    """Named tensors that are read on demand."""

    shapes: Mapping[str, tuple[int, ...]]  # of all tensors, known without reading them
    read: Callable[[str], np.ndarray]

    @property
    def num_blocks(self) -> int:
        """Blocks that have a tensor."""
        matches = (_BLOCK.search(name) for name in self.shapes)
        return len({match[1] for match in matches if match})

    @property
    def longest_axis(self) -> int:
        """The longest axis of a tensor, which no size of the model exceeds."""
        return max((axis for shape in self.shapes.values() for axis in shape), default=0)


def is_in_block(name: str) -> bool:
    """Whether a tensor of this name belongs to a block."""
    return _BLOCK.search(name) is not None


def check_num_blocks(
    fields: Fields, num_blocks: int, source: Source, name: str = "num_blocks"
) -> None:
    """Raises ConfigError if the config has more blocks than the weights, before building any.

    Weights without a single block have other names, which the error about these shows.
    """
    stored = source.num_blocks
    what = f"at most {stored}, the number of blocks in the weights"
    fields.require(name, num_blocks, what, fits=num_blocks <= (stored or MAX_UNKNOWN_BLOCKS))


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Source:
    """A source of floating-point arrays in memory; raises WeightsError for other arrays."""
    invalid = []
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", type(array).__name__)
        # bfloat16 is an extension type: its kind is not "f".
        if not isinstance(dtype, np.dtype) or (dtype.kind != "f" and dtype.name != "bfloat16"):
            invalid.append(f"{name} ({dtype})")
    if invalid:
        raise WeightsError(
            f"tensors must be floating-point arrays, got {first_of(invalid, 3)}; "
            "convert them with `.float().numpy()` or leave them out."
        )
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    return Source(shapes, lambda name: np.asarray(arrays[name]))


def from_file(file: Path) -> Source:
    """A source of one safetensors file; raises WeightsError if it is missing or corrupt."""
    return _from_files([file])


def from_folder(folder: Path) -> Source:
    """A source of the safetensors files in a folder.

    Raises:
        WeightsError: a file is missing or corrupt, or a tensor is in two files.
    """
    return _from_files(files_of(folder))


def _from_files(files: Sequence[Path]) -> Source:
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in _header(file).items():
            if name in file_of:
                raise WeightsError(
                    f"tensor {quote(name)} must be in one file of {quote_path(file.parent)}, but "
                    f"is in {quote_path(file_of[name].name)} and {quote_path(file.name)}; delete "
                    "one of them."
                )
            file_of[name], shapes[name] = file, shape

    def read(name: str) -> np.ndarray:
        # Mapped anew for each tensor: pages that were read do not stay in memory.
        with _open(file_of[name]) as file:
            return file.get_tensor(name)

    return Source(shapes, read)


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that have its weights; raises WeightsError if one is missing."""
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():  # as in transformers, an index is then ignored
        return [single]
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise no_weights(quote_path(folder), [path.name for path in folder.iterdir()])
        return files
    names = names_in(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise lacks(quote_path(folder), missing, len(names))
    return [folder / name for name in names]


def no_weights(where: str, names: Sequence[str]) -> WeightsError:
    """The error for a folder, called `where`, whose files `names` include no safetensors."""
    others = [name for name in names if name.endswith(OTHER_FORMATS)]
    has = f"only {first_of(others, 3)}, which may run code when read" if others else "none"
    return WeightsError(
        f"{where} must have weights in safetensors files, {SINGLE} or shards with {INDEX}, but "
        f"has {has}; convert them with save_pretrained of transformers."
    )


def lacks(where: str, missing: Sequence[str], count: int) -> WeightsError:
    """The error for a folder, called `where`, without some of the `count` files in its index."""
    return WeightsError(
        f"{where} lacks {first_of(missing, 3)} of the {count} files in {INDEX}; download them "
        "again, or ask for them where the weights are from."
    )


def is_weights(name: str) -> bool:
    """Whether a file of this name has weights, or is their index."""
    return name == INDEX or fnmatch.fnmatch(name, "model*.safetensors") and "/" not in name


def names_in(index: Path) -> list[str]:
    """The names of the files in an index; raises WeightsError if it is not valid."""
    try:
        check_size(index, MAX_INDEX_BYTES)
        values = read_json(index)
    except (ConfigError, OSError) as error:
        raise WeightsError(str(error)) from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(
            f"{quote_path(index)} must have a weight_map from tensors to files, got "
            f"{quote(weight_map)}; download it again."
        )
    for file in weight_map.values():
        # Names only: an untrusted index must not choose files elsewhere. Links are followed,
        # as the cache of the Hugging Face hub consists of them.
        if not (isinstance(file, str) and _is_file_name(file)):
            raise WeightsError(
                f"weight_map of {quote_path(index)} must have names of files in its folder, got "
                f"{quote(file)}; download it again."
            )
    return sorted(set(weight_map.values()))


def _is_file_name(name: str) -> bool:
    # Windows' rules include those of other systems: both separators, and drives.
    is_single = PureWindowsPath(name).name == name != ".."
    return is_single and bool(name.strip()) and name.isprintable() and len(name.encode()) <= 255


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with _open(file) as opened:
        # A slice has dtype and shape without reading the data.
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        for name, part in slices.items():
            if part.get_dtype() not in READABLE_DTYPES:
                raise WeightsError(
                    f"tensor {quote(name)} of {quote_path(file)} must be one of "
                    f"{', '.join(READABLE_DTYPES)}, got {part.get_dtype()}; convert it first."
                )
        return {name: tuple(part.get_shape()) for name, part in slices.items()}


def _open(file: Path) -> Any:
    safetensors = import_safetensors()
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{quote_path(file)} must be a complete safetensors file, but is corrupt or truncated "
            f"({printable(str(error))[:200]}); download it again."
        ) from error


def import_safetensors() -> Any:
    """Imports the optional package safetensors; raises ConfigError if it is not installed."""
    purpose = "reading and writing weights of other implementations"
    import_optional("safetensors.numpy", purpose, install="xlstm-jax[hf]")
    return sys.modules["safetensors"]


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; needs no second array."""
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def warn_not_finite(names: Sequence[str]) -> None:
    """Warns once about the tensors with values that are NaN or infinite, if any."""
    if names:
        others = f" and {len(names) - 1} others have" if len(names) > 1 else " has"
        warnings.warn(
            f"tensor {quote(names[0])}{others} values that are NaN or infinite, so that the model "
            "computes NaN; check the source of the weights.",
            WeightsWarning,
            stacklevel=3,
        )


def write(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    dtype: str,
    max_shard_bytes: int,
    files: Mapping[str, str],
) -> None:
    """Writes tensors as safetensors shards, and text files (name -> text).

    One shard at a time is in host memory. Other arguments and errors are those of `hf.save_hf`.
    """
    if dtype not in STORAGE_DTYPES:
        raise ConfigError(
            f"dtype={quote(dtype)} must be one of {', '.join(STORAGE_DTYPES)}; use float32."
        )
    if max_shard_bytes < 1:
        raise ConfigError(
            f"max_shard_bytes must be at least 1, got {quote(max_shard_bytes)}; use 5 * 10**9, say."
        )
    check_writable(folder, files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, hence on the same file system: os.replace below is atomic.
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        error.filename = str(folder)  # not the name of the draft, which the caller does not know
        raise
    draft.chmod(0o755)  # mkdtemp makes folders private to the owner
    try:
        _write_shards(draft, tensors, STORAGE_DTYPES[dtype], max_shard_bytes)
        for name, text in files.items():
            (draft / name).write_text(text)
        if not folder.exists():
            os.replace(draft, folder)
            return
        # The config comes last: a folder without it is not read as a complete checkpoint.
        for path in sorted(draft.iterdir(), key=lambda path: path.name in files):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_writable(folder: Path, files: Iterable[str] = ("config.json",)) -> None:
    """Raises ConfigError if the folder contains weights or one of these files, or is a file."""
    existing = [*folder.glob("*.safetensors*"), *(p for f in files if (p := folder / f).exists())]
    if folder.is_file() or existing:
        raise ConfigError(
            f"folder={quote_path(folder)!r} must be new or have no weights, but "
            + (f"contains {quote_path(existing[0].name)}" if existing else "is a file")
            + "; choose another one."
        )


def _write_shards(
    draft: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: np.dtype, limit: int
) -> None:
    safetensors = import_safetensors()
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0  # bytes

    def write_shard() -> None:
        # The number of shards, part of their final names, is not known yet.
        file = draft / f"{len(shards)}.part"
        # PyTorch readers require this metadata.
        safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, array in tensors:
        array = np.asarray(array).astype(dtype, copy=False)
        if shard and array.nbytes + sum(other.nbytes for other in shard.values()) > limit:
            write_shard()
        shard[name] = array
        total += array.nbytes
    write_shard()
    if len(shards) == 1:
        os.replace(draft / "0.part", draft / SINGLE)
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
