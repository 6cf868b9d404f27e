"""Compiles functions for one chip or a small mesh, and finds our kernels in compiled programs."""

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import common
from pallas_kernels.aot import topologies
from pallas_kernels.hardware import GPUS, TPUS

KERNEL = r"(?:mlstm|slstm)_(?:forward|backward|decode)"
"""Pattern of the names of our TPU kernels."""

AXES = ("data", "fsdp", "seq", "tensor")


def devices(chip: str, count: int = 1) -> tuple[Any, ...]:
    """Devices of one small TPU slice, or of one GPU host.

    Args:
        chip: a key of `hardware.TPUS` or of `hardware.ARCHITECTURES`.
        count: number of devices; at most 4 TPU chips.
    """
    if chip in TPUS:
        shape = (2, 2) if chip in ("v5e", "v6e") else (2, 2, 1)
        return topologies.tpu_slices(chip, shape)[:count]
    name = next(name for name, gpu in GPUS.items() if gpu.target == chip)
    return topologies.gpu_hosts(name, 1, count)


def make_mesh(devices: Sequence[Any], *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh with axes `AXES` over the devices in order; "data" gets the remaining factor."""
    sizes = (len(devices) // (fsdp * tensor), fsdp, 1, tensor)
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def compile_for(
    chip: str, fn, *args, mesh: Mesh | None = None, shardings=None, donate: int | None = None
) -> jax.stages.Compiled:
    """Compiles `fn` for arguments of these shapes, for one chip or for a mesh.

    Triton kernels are compiled to PTX only; `resources` also assembles them.

    Args:
        chip: as in `devices`.
        args: trees of `jax.ShapeDtypeStruct`.
        mesh: from `make_mesh` over `devices`; None: one device.
        shardings: for a mesh, a tree like `args` with a sharding for every array.
        donate: index of an argument whose buffers the results may reuse.
    """
    if mesh is None:
        mesh = make_mesh(devices(chip))
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
    args = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, shardings
    )
    with common.compiled_for(chip), jax.set_mesh(mesh):
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def kernels(compiled: jax.stages.Compiled) -> set[str]:
    """The names of our kernels in a compiled TPU or GPU program."""
    return kernel_names(str(compiled.as_text()))


def kernel_names(text: str) -> set[str]:
    """As `kernels`, from the text of a program."""
    names = {name for call in _tpu_calls(text) for name in re.findall(KERNEL, call)}
    configs = re.findall(r'"triton_kernel_call\w*",.*?backend_config=(.*)', text)
    return names | {_triton_name(config) for config in configs}


def bytes_accessed(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Total size of the operands and results of each of our TPU kernels, by name."""
    sizes = {}
    for text in _tpu_calls(str(compiled.as_text())):
        name = re.search(KERNEL, text)
        results, _, rest = text.partition(" custom-call(")
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", rest, re.DOTALL)
        if name and operands:
            sizes[name[0]] = _array_bytes(results) + _array_bytes(operands[1])
    return sizes


def _array_bytes(text: str) -> int:
    """Total size of the arrays in a piece of HLO text, such as `bf16[8,128]`."""
    item = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}
    arrays = re.findall(rf"\b({'|'.join(item)})\[([\d,]+)\]", text)
    return sum(item[kind] * math.prod(map(int, sizes.split(","))) for kind, sizes in arrays)


def _tpu_calls(text: str) -> list[str]:
    """The HLO instructions that call TPU kernels; with metadata they take several lines."""
    instruction = r"^\s*(?:ROOT )?%\S+ = "
    instructions = re.split(f"(?={instruction})", text, flags=re.MULTILINE)
    return [text for text in instructions if '"tpu_custom_call"' in text]


def _triton_name(config: str) -> str:
    """The name of a call: the last field of the compressed message from jax-triton to XLA."""
    opaque = re.search(r'(opaque = )?"((?:[^"\\]|\\.)*)"', config)
    assert opaque is not None
    escaped = opaque[2].encode("latin-1")
    if opaque[1]:  # jax-triton 0.4: an MLIR attribute, whose escapes are hexadecimal
        message = re.sub(rb"\\(\\|[0-9A-F]{2})", _hexadecimal, escaped)
    else:
        message = escaped.decode("unicode_escape").encode("latin-1")
    name = re.search(rb'".(\w+)\Z', zlib.decompress(message), re.DOTALL)
    assert name is not None
    return name[1].decode()


def _hexadecimal(escape: re.Match[bytes]) -> bytes:
    return escape[1] if escape[1] == b"\\" else bytes.fromhex(escape[1].decode())
