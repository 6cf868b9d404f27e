"""What every Triton kernel takes of a GPU, by Triton's own assembler.

Triton's wheel has the assembler, so no CUDA toolkit is needed. With a GPU attached XLA takes the
assembler that it finds there, so registers may differ by a few.
"""

import functools
import importlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from pallas_kernels import common
from pallas_kernels.hardware import ARCHITECTURES

MOST_REGISTERS = 254
"""Of a thread: at 255 the assembler has run out of them, spilled or not."""

TENSOR_COLUMNS = 512
"""Of a Blackwell's tensor memory: beyond, Triton writes a kernel that stops the device."""

MATRIX_UNITS = ("tcgen05.mma", "wgmma", "mma.sync")
ELEMENTS = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint32": "u32"}
ELEMENTS |= {"int8": "i8", "uint8": "u8", "bool": "i1"}


class Resources(NamedTuple):
    """One kernel as the assembler has laid it out."""

    name: str  # of the call
    registers: int  # of a thread; 255 at most
    spills: int  # bytes of register spills of a thread
    shared_bytes: int  # of a program
    tensor_columns: int  # of a Blackwell's tensor memory, which has 512
    assembly: float  # version of the language that Triton wrote for the assembler
    matrix_unit: str  # the instruction that multiplies matrices; "" if none does
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    constants: dict[str, Any]


class Launch(NamedTuple):
    """A call of a kernel: all that its compilation depends on."""

    kernel: Any  # of `triton.jit`
    name: str
    grid: tuple[int, ...]
    parameters: tuple[tuple[str, str], ...]  # name and type
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def resources(chip: str, fn: Callable[..., Any], *args) -> list[Resources]:
    """Those of every Triton kernel that `fn` launches on `chip`, each once, in order.

    Args:
        chip: a key of `hardware.ARCHITECTURES`.
        fn: a pure function; a gradient shows what it launches, its forward pass included.
        args: trees of `jax.ShapeDtypeStruct`.
    """
    capability = ARCHITECTURES[chip].capability
    return [_assembled(launch, capability) for launch in launches_for(chip, fn, *args)]


def launches_for(chip: str, fn: Callable[..., Any], *args) -> list[Launch]:
    """As `launches`, compiled ahead of time for `chip`."""
    with common.compiled_for(chip):
        return launches(fn, *args)


def launches(fn: Callable[..., Any], *args) -> list[Launch]:
    """Every Triton kernel that `fn` calls, each once, in order."""
    return list(dict.fromkeys(map(_launch, _calls(jax.make_jaxpr(fn)(*args).jaxpr))))


def _calls(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The calls of Triton kernels, in functions within functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from _calls(inner)


def _launch(equation: core.JaxprEqn) -> Launch:
    """From a call's parameters, whose names changed between jax-triton 0.3 and 0.4."""
    params = dict(equation.params)
    arrays: list[Any] = [variable.aval for variable in equation.invars]
    results: list[Any] = [variable.aval for variable in equation.outvars]
    if "metaparams" in params:
        constants, options = params["metaparams"], params["backend_options"]
        # Where a result stands, or a number for one that takes the place of an array.
        arrays = params["in_tree"].unflatten(arrays)
        arrays = [results[x.ordinal] if hasattr(x, "ordinal") else x for x in arrays]
    else:
        names = {parameter.name for parameter in params["fn"].params}
        constants = {key: value for key, value in params.items() if key in names}
        options = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
        options = {key: params[key] for key in options}
        arrays = arrays + results
    names = [name for name in params["fn"].arg_names if name not in constants]
    types = [f"*{ELEMENTS[str(x.dtype)]}" if hasattr(x, "dtype") else "i32" for x in arrays]
    return Launch(
        params["fn"],
        params["name"],
        params["grid"],
        tuple(zip(names, types, strict=True)),
        tuple(sorted(constants.items())),
        tuple(sorted(options.items())),
    )


@functools.cache
def _assembled(launch: Launch, capability: int) -> Resources:
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    constants = dict(launch.constants)
    source = triton.compiler.ASTSource(
        launch.kernel,
        signature=dict(launch.parameters) | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        # jax-triton says the same of all arrays: XLA's begin at multiples of 16 bytes.
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, (_, kind) in enumerate(launch.parameters)
            if kind.startswith("*")
        },
    )
    with triton.knobs.cache.scope():
        # jax-triton takes the folder away; without one nothing is compiled.
        triton.knobs.cache.dir = triton.knobs.cache.get_triton_dir("cache")
        kernel = triton.compile(source, target=target, options=dict(launch.options))
    used = _usage(triton.knobs.nvidia.cuobjdump.path, kernel.asm["cubin"])
    version = re.search(r"\.version (\d+\.\d+)", kernel.asm["ptx"])
    assert version is not None
    units = (unit for unit in MATRIX_UNITS if unit in kernel.asm["ptx"])
    return Resources(
        name=launch.name,
        registers=used["REG"],
        # A frame on the stack is what ptxas makes for spills; nothing else of ours needs one.
        spills=used["STACK"] + used["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0),
        assembly=float(version[1]),
        matrix_unit=next(units, ""),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        grid=launch.grid,
        constants=constants,
    )


def _usage(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """What the assembler has noted of the one function in `cubin`."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [cuobjdump, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def complaints(chip: str, found: Resources) -> list[str]:
    """What exceeds the limits of `chip`; empty: the kernel fits."""
    limits = {
        "bytes spilled": (found.spills, 0),
        "registers": (found.registers, MOST_REGISTERS),
        "bytes of shared memory": (found.shared_bytes, ARCHITECTURES[chip].shared_bytes),
        "columns of tensor memory": (found.tensor_columns, TENSOR_COLUMNS),
    }
    return [
        f"{found.name} on {chip}: {value} {what}, at most {most}"
        for what, (value, most) in limits.items()
        if value > most
    ]
