"""Compiling functions for one chip or a small mesh, and finding our kernels in the programs."""

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
"""Names of TPU kernels."""

AXES = ("data", "fsdp", "seq", "tensor")


def devices(chip: str, count: int = 1) -> tuple[Any, ...]:
    """Devices of one small slice, or of one host.

    Args:
        chip: a key of `hardware.TPUS` or of `hardware.ARCHITECTURES`.
        count: at most 4 TPUs.
    """
    if chip in TPUS:
        shape = (2, 2) if chip in ("v5e", "v6e") else (2, 2, 1)
        return topologies.tpu_slices(chip, shape)[:count]
    name = next(name for name, gpu in GPUS.items() if gpu.target == chip)
    return topologies.gpu_hosts(name, 1, count)


def mesh_of(devices: Sequence[Any], *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Devices in their order along `AXES`; data takes what the others leave."""
    sizes = (len(devices) // (fsdp * tensor), fsdp, 1, tensor)
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def compile_for(
    chip: str, fn, *args, mesh: Mesh | None = None, shardings=None, donate: int | None = None
) -> jax.stages.Compiled:
    """`fn` compiled for arguments of these shapes, for one chip or for a mesh.

    Triton compiles its kernels to assembly; what the assembler makes of it is in `resources`.

    Args:
        chip: as in `devices`.
        fn: a pure function.
        args: trees of `jax.ShapeDtypeStruct`.
        mesh: of `devices`, by `mesh_of`; None: one device.
        shardings: for a mesh, a sharding for every array, in a tree like `args`.
        donate: the number of an argument whose memory the results may take.
    """
    if mesh is None:
        mesh = mesh_of(devices(chip))
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
    args = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), args, shardings
    )
    with common.compiled_for(chip), jax.set_mesh(mesh):
        return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def kernels(compiled: jax.stages.Compiled) -> set[str]:
    """The names of our kernels in a program for TPUs or GPUs."""
    return kernel_names(str(compiled.as_text()))


def kernel_names(text: str) -> set[str]:
    """As `kernels`, of the text of a program."""
    names = {name for call in _tpu_calls(text) for name in re.findall(KERNEL, call)}
    configs = re.findall(r'"triton_kernel_call\w*",.*?backend_config=(.*)', text)
    return names | {_triton_name(config) for config in configs}


def bytes_accessed(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What each of our TPU kernels reads and writes: its operands and results, each once."""
    sizes = {}
    for text in _tpu_calls(str(compiled.as_text())):
        name = re.search(KERNEL, text)
        results, _, rest = text.partition(" custom-call(")
        operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", rest, re.DOTALL)
        if name and operands:
            sizes[name[0]] = _array_bytes(results) + _array_bytes(operands[1])
    return sizes


def _array_bytes(text: str) -> int:
    """The size of all arrays that a piece of a program's text names, such as `bf16[8,128]`."""
    item = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}
    arrays = re.findall(rf"\b({'|'.join(item)})\[([\d,]+)\]", text)
    return sum(item[kind] * math.prod(map(int, sizes.split(","))) for kind, sizes in arrays)


def _tpu_calls(text: str) -> list[str]:
    """The instructions that call kernels; one with metadata takes several lines."""
    instruction = r"^\s*(?:ROOT )?%\S+ = "
    pieces = re.split(f"(?={instruction})", text, flags=re.MULTILINE)
    return [piece for piece in pieces if '"tpu_custom_call"' in piece]


def _triton_name(config: str) -> str:
    """The name of a call: the last field of the compressed message that jax-triton gives XLA."""
    opaque = re.search(r'(opaque = )?"((?:[^"\\]|\\.)*)"', config)
    assert opaque is not None
    escaped = opaque[2].encode("latin-1")
    if opaque[1]:  # jax-triton 0.4: an attribute of MLIR, whose escapes are hexadecimal
        message = re.sub(rb"\\(\\|[0-9A-F]{2})", _hexadecimal, escaped)
    else:
        message = escaped.decode("unicode_escape").encode("latin-1")
    name = re.search(rb'".(\w+)\Z', zlib.decompress(message), re.DOTALL)
    assert name is not None
    return name[1].decode()


def _hexadecimal(escape: re.Match[bytes]) -> bytes:
    return escape[1] if escape[1] == b"\\" else bytes.fromhex(escape[1].decode())
