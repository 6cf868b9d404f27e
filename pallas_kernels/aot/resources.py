"""Registers, spills and shared memory of Triton kernels, as reported by Triton's ptxas.

Triton's wheel bundles ptxas, so no CUDA toolkit is needed. On a machine with a GPU XLA may use
another version of ptxas, so register counts may differ by a few.
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

TENSOR_COLUMNS = 512
"""Columns of Blackwell's tensor memory; beyond it Triton emits a kernel that halts the device."""

MATRIX_UNITS = ("tcgen05.mma", "wgmma", "mma.sync")
ELEMENTS = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint32": "u32"}
ELEMENTS |= {"int8": "i8", "uint8": "u8", "bool": "i1"}


class Resources(NamedTuple):
    """Resource usage of one assembled kernel."""

    name: str  # of the call
    registers: int  # per thread, at most 255
    spills: int  # bytes of register spills per thread
    shared_bytes: int  # shared memory per program
    tensor_columns: int  # columns of tensor memory (Blackwell), at most 512
    ptx_version: float
    matrix_unit: str  # the matrix-multiply instruction; "" if the kernel has none
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    constants: dict[str, Any]


class Launch(NamedTuple):
    """A kernel call, with everything that its compilation depends on."""

    kernel: Any  # a function decorated with `triton.jit`
    name: str
    grid: tuple[int, ...]
    parameters: tuple[tuple[str, str], ...]  # name and type
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def resources(chip: str, fn: Callable[..., Any], *args) -> list[Resources]:
    """Resources of every distinct Triton kernel that `fn` launches on `chip`, in order.

    Args:
        chip: a key of `hardware.ARCHITECTURES`.
        fn: a pure function; a gradient function includes its forward pass.
        args: trees of `jax.ShapeDtypeStruct`.
    """
    capability = ARCHITECTURES[chip].capability
    return [_assembled(launch, capability) for launch in launches_for(chip, fn, *args)]


def launches_for(chip: str, fn: Callable[..., Any], *args) -> list[Launch]:
    """As `launches`, for ahead-of-time compilation for `chip`."""
    with common.compiled_for(chip):
        return launches(fn, *args)


def launches(fn: Callable[..., Any], *args) -> list[Launch]:
    """Every distinct Triton kernel launch of `fn`, in order."""
    return list(dict.fromkeys(map(_launch, _calls(jax.make_jaxpr(fn)(*args).jaxpr))))


def _calls(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The calls of Triton kernels, including those in nested jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from _calls(inner)


def _launch(equation: core.JaxprEqn) -> Launch:
    """The launch of a call, whose parameter names differ between jax-triton 0.3 and 0.4."""
    params = dict(equation.params)
    arguments: list[Any] = [variable.aval for variable in equation.invars]
    results: list[Any] = [variable.aval for variable in equation.outvars]
    if "metaparams" in params:
        constants, options = params["metaparams"], params["backend_options"]
        # 0.4: placeholders with an ordinal stand for results, and those with a value for sizes.
        arguments = params["in_tree"].unflatten(arguments)
        arguments = [results[x.ordinal] if hasattr(x, "ordinal") else x for x in arguments]
        arguments = [getattr(x, "value", x) for x in arguments]
    else:
        names = {parameter.name for parameter in params["fn"].params}
        constants = {key: value for key, value in params.items() if key in names}
        options = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
        options = {key: params[key] for key in options}
        for index, _, value in params["scalar_args"]:
            arguments.insert(index, value)
        arguments = arguments + results
    names = [name for name in params["fn"].arg_names if name not in constants]
    parameters = dict(zip(names, arguments, strict=True))
    # As in jax-triton: a size of 1 is a constant.
    constants = dict(constants) | {name: 1 for name, x in parameters.items() if _is_one(x)}
    return Launch(
        params["fn"],
        params["name"],
        params["grid"],
        tuple((name, _type(x)) for name, x in parameters.items() if name not in constants),
        tuple(sorted(constants.items())),
        tuple(sorted(options.items())),
    )


def _is_one(argument: Any) -> bool:
    return isinstance(argument, int) and argument == 1


def _type(argument: Any) -> str:
    """Triton's name for the type of a run-time size or of a pointer to an array."""
    return "i32" if isinstance(argument, int) else f"*{ELEMENTS[str(argument.dtype)]}"


@functools.cache
def _compiled(launch: Launch, capability: int) -> Any:
    """The kernel of a launch, compiled by Triton."""
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    types, constants = dict(launch.parameters), dict(launch.constants)
    names = launch.kernel.arg_names
    source = triton.compiler.ASTSource(
        launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        # As in jax-triton: XLA aligns all arrays to at least 16 bytes.
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(names)
            if types.get(name, "").startswith("*")
        },
    )
    with triton.knobs.cache.scope():
        # jax-triton unsets the cache directory, without which Triton does not compile.
        triton.knobs.cache.dir = triton.knobs.cache.get_triton_dir("cache")
        return triton.compile(source, target=target, options=dict(launch.options))


def cubin(launch: Launch, chip: str) -> bytes:
    """The assembled kernel of a launch."""
    return _compiled(launch, ARCHITECTURES[chip].capability).asm["cubin"]


@functools.cache
def _assembled(launch: Launch, capability: int) -> Resources:
    triton = importlib.import_module("triton")
    kernel = _compiled(launch, capability)
    usage = _usage(triton.knobs.nvidia.cuobjdump.path, kernel.asm["cubin"])
    version = re.search(r"\.version (\d+\.\d+)", kernel.asm["ptx"])
    assert version is not None
    units = (unit for unit in MATRIX_UNITS if unit in kernel.asm["ptx"])
    return Resources(
        name=launch.name,
        registers=usage["REG"],
        # ptxas spills to a stack frame; our kernels use the stack for nothing else.
        spills=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0),
        ptx_version=float(version[1]),
        matrix_unit=next(units, ""),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        grid=launch.grid,
        constants=dict(launch.constants),
    )


def _usage(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """Resource usage of the single function in `cubin`, by the keys of cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [cuobjdump, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def exceeded_limits(chip: str, kernel: Resources) -> list[str]:
    """A message for every limit of `chip` that the kernel exceeds; empty: it fits."""
    limits = {
        "bytes spilled": (kernel.spills, 0),
        "bytes of shared memory": (kernel.shared_bytes, ARCHITECTURES[chip].shared_bytes),
        "columns of tensor memory": (kernel.tensor_columns, TENSOR_COLUMNS),
    }
    return [
        f"{kernel.name} on {chip}: {value} {unit}, at most {limit}"
        for unit, (value, limit) in limits.items()
        if value > limit
    ]
