"""Calling a Triton kernel from JAX: compiled by jax-triton, or computed by Triton's interpreter.

jax-triton changed the names of its arguments between 0.3 (jax 0.10) and 0.4 (jax 0.11); nothing
outside of this file knows. Both keep what they have compiled by kernel, shapes and constants.
"""

import functools
import importlib
import importlib.metadata
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.hardware import ARCHITECTURES

OLDEST = 80
"""Compute capability of Ampere, times ten: the first with products of bfloat16."""


def current_chip() -> str | None:
    """The key in `hardware.ARCHITECTURES` of the GPU that functions traced now run on, or None.

    A GPU between two of them is taken for the older one.
    """
    if target := common.target():
        return target
    capability = _capability() or 0
    known = [name for name, chip in ARCHITECTURES.items() if chip.capability <= capability]
    return known[-1] if known else None


def width(size: int, lanes: int) -> int:
    """The width that heads are padded to: a power of two, beyond 64 a multiple of 64."""
    if size > 64:
        return common.round_up(size, 64)
    return max(min(lanes, 16), 1 << (size - 1).bit_length())


def divisor(size: int, most: int) -> int:
    """The largest power of two that divides `size`, up to `most`."""
    return min(size & -size, most)


def refusal() -> str | None:
    """Why no Triton kernel can run on this machine's GPU, or None."""
    if common.target() is None:
        capability = _capability()
        if capability is None:
            return f"it needs an NVIDIA GPU, not a {jax.devices()[0].device_kind!r}"
        if capability < OLDEST:
            kind = jax.devices()[0].device_kind
            return (
                f"it needs an NVIDIA GPU of compute capability 8.0 or newer (Ampere), a {kind} has "
                f"{capability // 10}.{capability % 10}"
            )
    return _unusable()


def interpreter_refusal() -> str | None:
    """Why Triton's interpreter cannot compute kernels in this process, or None."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "triton is not installed; `pip install triton`"
    if triton.knobs.runtime.interpret:
        return None
    return "Triton compiles in this process; set TRITON_INTERPRET=1 before it is imported"


def call(
    kernel: Any,
    arrays: Sequence[jax.Array],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    grid: tuple[int, ...],
    num_warps: int = 4,
    num_stages: int = 2,
    aliases: Mapping[int, int] | None = None,
    target: str | None = None,
    interpret: bool = False,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Results of a Triton kernel, whose parameters are the arrays, the results, then constants.

    Args:
        kernel: what `triton.jit` returns.
        arrays: contiguous, as all arrays of XLA.
        out_shape: of the results, uninitialized before the kernel writes them.
        name: of the call in the compiled program.
        grid: programs along up to three axes.
        num_warps, num_stages: of `triton.Config`.
        aliases: number of an array to the number of the result that takes its place in memory, to
            be written through the array's parameter. Such results come last, and what stands for
            them among the parameters, which jax-triton 0.4 does not fill, is left alone.
        target: a key of `hardware.ARCHITECTURES`, to compile ahead of time; None: the current GPU.
        interpret: compute on the host, one program after the other; for tests.
        constants: the kernel's `tl.constexpr` parameters.

    There is no gradient and no `vmap`: see `common.folding`.
    """
    aliases = dict(aliases or {})
    if interpret:
        return _interpreted(kernel, arrays, out_shape, grid, aliases, constants)
    jax_triton = importlib.import_module("jax_triton")
    _write_for_the_older_assembler()
    if _version("jax-triton") >= (0, 4):
        named: dict[str, Any] = {"out_type": tuple(out_shape)}
        named["backend_options"] = {"enable_fp_fusion": True}  # the default of 0.3
        constants |= {kernel.arg_names[len(arrays) + result]: 0 for result in aliases.values()}
    else:
        named = {"out_shape": tuple(out_shape)}
    with warnings.catch_warnings():
        # 0.4 would have mutable arrays instead, which 0.3 does not take.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        return jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            name=name,
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            input_output_aliases=aliases,
            compute_capability=None if target is None else ARCHITECTURES[target].capability,
            **named,
            **constants,
        )


def _capability() -> int | None:
    """Of the first device, times ten; None: no NVIDIA GPU."""
    try:
        major, minor = str(getattr(jax.devices()[0], "compute_capability", None)).split(".")
        return 10 * int(major) + int(minor)
    except ValueError:  # not a GPU, or one of AMD, whose capability is a name
        return None


@functools.cache
def _unusable() -> str | None:
    """Why Triton kernels cannot be compiled in this environment, or None."""
    way_out = "install the pair that belongs to this jax: `pip install xlstm-jax[gpu]`"
    for module, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                return f"{package} is not installed; {way_out}"
            return f"{package} does not load ({error}); {way_out}"
        except Exception as error:  # whatever versions that do not belong together may raise
            return f"{package} does not load ({type(error).__name__}: {error}); {way_out}"
    if (_version("jax") >= (0, 11)) != (_version("jax-triton") >= (0, 4)):
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jax-triton"))
        return f"{versions} do not belong together; {way_out}"
    if importlib.import_module("triton").knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so Triton compiles nothing; unset it"
    return None


@functools.cache
def _write_for_the_older_assembler() -> None:
    """Have Triton write what the assembler of CUDA 12.9 reads, which is the one beside jax.

    It brings two of its own; from Hopper on it would write for the newer, which XLA does not use.
    """
    nvidia = importlib.import_module("triton").knobs.nvidia
    if not os.environ.get("TRITON_PTXAS_BLACKWELL_PATH"):
        nvidia.ptxas_blackwell = nvidia.ptxas.path


def _version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


_interpreter_lock = threading.Lock()
"""Triton's interpreter keeps the program's number in one place for all threads."""


def _interpreted(kernel, arrays, out_shape, grid, aliases, constants) -> tuple[jax.Array, ...]:
    def run(*inputs):
        inputs = [np.array(x) for x in inputs]
        # Memory that nobody has written holds NaN, so that reading it shows.
        outputs = [
            np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)
            for x in out_shape
        ]
        for source, result in aliases.items():
            outputs[result] = inputs[source]
        # A GPU says nothing of overflows either.
        with _interpreter_lock, np.errstate(all="ignore"):
            kernel[grid](*(_HostArray(x) for x in (*inputs, *outputs)), **constants)
        return tuple(outputs)

    return jax.pure_callback(run, tuple(out_shape), *arrays)


class _HostArray:
    """A NumPy array with as much of a tensor's interface as Triton's interpreter asks for.

    It is on the host already, so it is its own storage and its own copy.
    """

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape
        self.dtype = getattr(importlib.import_module("triton.language"), str(array.dtype))

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def _itself(self, *_, **__) -> "_HostArray":
        return self

    untyped_storage = cpu = new_empty = set_ = copy_ = _itself
    storage_offset = size = stride = _itself  # arguments of `set_`
