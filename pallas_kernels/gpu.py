"""Calls Triton kernels from JAX: compiled by jax-triton, or run by Triton's interpreter.

This module hides the argument names that differ between jax-triton 0.3 (jax 0.10) and 0.4
(jax 0.11). Both versions cache compiled kernels by kernel, shapes and constants.
"""

import concurrent.futures
import functools
import importlib
import importlib.metadata
import inspect
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.hardware import ARCHITECTURES

MIN_CAPABILITY = 80
"""Compute capability times ten: Ampere is the first generation with bfloat16 matrix products."""


def current_chip() -> str | None:
    """The key in `hardware.ARCHITECTURES` of the target or current GPU; None: not a known GPU.

    A GPU whose capability is between two entries maps to the older one.
    """
    if target := common.target():
        return target
    capability = _capability() or 0
    known = [name for name, chip in ARCHITECTURES.items() if chip.capability <= capability]
    return known[-1] if known else None


def width(size: int, lanes: int) -> int:
    """The width that heads are padded to: a power of two up to 64, then a multiple of 64."""
    if size > 64:
        return common.round_up(size, 64)
    return max(min(lanes, 16), 1 << (size - 1).bit_length())


def divisor(size: int, limit: int) -> int:
    """The largest power of two that divides `size`, but at most `limit` (a power of two)."""
    return min(size & -size, limit)


def refusal() -> str | None:
    """Why Triton kernels cannot run on the current device; None if they can."""
    if common.target() is None:
        capability, kind = _capability(), jax.devices()[0].device_kind
        if capability is None and jax.devices()[0].platform in ("gpu", "rocm"):
            return f"it is compiled for NVIDIA GPUs only, not for {kind!r}, an AMD GPU (ROCm)"
        if capability is None:
            return f"it needs an NVIDIA GPU, got {kind!r}"
        if capability < MIN_CAPABILITY:
            return (
                f"it needs compute capability 8.0 (Ampere) or higher, a {kind} has "
                f"{capability // 10}.{capability % 10}"
            )
    return _environment_refusal(current_chip())


def interpreter_refusal() -> str | None:
    """Why Triton's interpreter cannot run kernels in this process; None if it can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return "triton is not installed; `pip install triton`"
    if triton.knobs.runtime.interpret:
        return None
    return "Triton's interpreter is off; set TRITON_INTERPRET=1 before triton is imported"


def call(
    kernel: Any,
    arrays: Sequence[jax.Array],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    *,
    name: str,
    grid: tuple[int, ...],
    sizes: Sequence[int] = (),
    num_warps: int = 4,
    num_stages: int = 2,
    target: str | None = None,
    interpret: bool = False,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Launches a Triton kernel, whose parameters are arrays, sizes, results, then constants.

    The call has no gradient and no `vmap` rule; see `common.fold_vmap`. A kernel writes to results
    only. Still, XLA gives an operand and a result one buffer if they are slices of a loop carry, at
    the loop's own index. So of a state, no program may read what another one writes.

    Args:
        kernel: a function decorated with `triton.jit`.
        arrays: operands; contiguous, like all XLA arrays.
        out_shape: shapes of the results, which are uninitialized until the kernel writes them.
        name: name of the call in the compiled program.
        grid: number of programs along up to three axes.
        sizes: integers that are known at run time; the kernel is compiled once for all of them,
            and once more for a size of 1.
        num_warps, num_stages: as in `triton.Config`.
        target: a key of `hardware.ARCHITECTURES`, to compile ahead of time; None: the current GPU.
        interpret: run on the host, one program after the other; for tests.
        constants: the kernel's `tl.constexpr` parameters.
    """
    if interpret:
        return _interpreted(kernel, arrays, sizes, out_shape, grid, constants)
    jax_triton = importlib.import_module("jax_triton")
    _target_older_ptxas()
    _adapt_dce_rule()
    if _version("jax-triton") >= (0, 4):
        named: dict[str, Any] = {"out_type": tuple(out_shape)}
        named["backend_options"] = {"enable_fp_fusion": True}  # the default of 0.3
    else:
        named = {"out_shape": tuple(out_shape)}
    return jax_triton.triton_call(
        *arrays,
        *sizes,
        kernel=kernel,
        name=name,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=None if target is None else ARCHITECTURES[target].capability,
        **named,
        **constants,
    )


def _capability() -> int | None:
    """Compute capability of the first device, times ten; None: not an NVIDIA GPU."""
    try:
        major, minor = str(getattr(jax.devices()[0], "compute_capability", None)).split(".")
        return 10 * int(major) + int(minor)
    except ValueError:  # not a GPU, or an AMD GPU, whose capability is a name
        return None


@functools.cache
def _environment_refusal(chip: str) -> str | None:
    """Why this environment cannot compile Triton kernels for `chip`; None if it can."""
    hint = "install the versions that match this jax: `pip install xlstm-jax[gpu]`"
    for module, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                return f"{package} is not installed; {hint}"
            return f"{package} cannot be imported ({error}); {hint}"
        except Exception as error:  # mismatched versions may raise anything
            return f"{package} cannot be imported ({type(error).__name__}: {error}); {hint}"
    if importlib.import_module("triton").knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, which disables Triton's compiler; unset it"
    try:
        # In a thread of its own, without the meshes and traces of the caller.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(_compile_probe, chip).result()
    except Exception as error:  # mismatched versions fail in many ways
        packages = ("jax", "jax-triton", "triton")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"{versions} together cannot compile a kernel for {chip} ({reason}); {hint}"
    return None


def _compile_probe(chip: str) -> None:
    """Compiles a one-line kernel to PTX; needs no GPU."""
    probe = importlib.import_module("pallas_kernels.triton_math").probe
    x = jax.ShapeDtypeStruct((1,), jnp.float32)
    compute = functools.partial(call, probe, out_shape=(x,), name="probe", grid=(1,), target=chip)
    jax.jit(lambda x: compute(arrays=(x,))).trace(x).lower(lowering_platforms=("cuda",))


@functools.cache
def _target_older_ptxas() -> None:
    """Makes Triton emit PTX for the ptxas of CUDA 12.9, which is installed with jax.

    Triton's wheel bundles two versions of ptxas and targets the newer one from Hopper on. XLA
    assembles the PTX with the older one.
    """
    nvidia = importlib.import_module("triton").knobs.nvidia
    if not os.environ.get("TRITON_PTXAS_BLACKWELL_PATH"):
        nvidia.ptxas_blackwell = nvidia.ptxas.path


@functools.cache
def _adapt_dce_rule() -> None:
    """Makes jax-triton 0.4 work with jax 0.12, whose rules to remove unused calls have one more
    argument."""
    if _version("jax") < (0, 12):
        return
    rules = importlib.import_module("jax._src.interpreters.partial_eval").dce_rules
    call_p = importlib.import_module("jax_triton.triton_lib").triton_kernel_call_p
    rule = rules.get(call_p)
    if rule is not None and len(inspect.signature(rule).parameters) == 2:
        rules[call_p] = lambda used_outputs, live_inputs, equation: rule(used_outputs, equation)


def _version(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


_interpreter_lock = threading.Lock()
"""Triton's interpreter stores the current program id in a global that all threads share."""


def _interpreted(kernel, arrays, sizes, out_shape, grid, constants) -> tuple[jax.Array, ...]:
    def run(*inputs):
        inputs = [np.asarray(x) for x in inputs]
        # NaN stands for uninitialized memory, so that reading it shows in the results.
        outputs = [
            np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype)
            for x in out_shape
        ]
        # Like a GPU, do not report overflow.
        with _interpreter_lock, np.errstate(all="ignore"):
            inputs, results = ([_HostArray(x) for x in arrays] for arrays in (inputs, outputs))
            kernel[grid](*inputs, *sizes, *results, **constants)
        return tuple(outputs)

    return jax.pure_callback(run, tuple(out_shape), *arrays)


class _HostArray:
    """A NumPy array with the part of the torch tensor interface that Triton's interpreter uses.

    The interpreter copies tensors to the host and back; these are on the host already.
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
