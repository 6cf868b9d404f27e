"""Times of kernels, of tile variants, and of exported programs."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from experiments.benchmarks import kernel_cases, kernel_jax, measure
from experiments.benchmarks.gpu.report import Record, Report
from experiments.benchmarks.gpu.settings import Settings, reference, refusal
from experiments.benchmarks.kernel_cases import Case
from pallas_kernels import common

GRADIENT_ONLY = ("dq dk of full width",)
"""Tile variants whose forward pass equals that of another variant."""

Timed = tuple[str, Case, str, Callable[..., Any] | None]
"""Name, case, implementation, and a function to time instead of the implementation."""


def kernels(report: Report, settings: Settings) -> None:
    """Times the mLSTM over heads and lengths, and its decode step over batch sizes."""
    todo: list[Timed] = []
    calls = [(heads, settings.length) for heads in settings.heads]
    calls += [(settings.heads[0], T) for T in settings.more_lengths]
    for heads, T in calls:
        for part in ("forward", "gradient"):
            case = settings.mlstm_case(part, heads, T)
            todo.append((f"{heads} T={T} {part}", case, settings.mlstm, None))
    for B in settings.decode_batches:
        case = settings.mlstm_case("decode", settings.heads[0], 1, B)
        todo.append((f"one step, B={B}", case, settings.mlstm, None))
    time_calls(report, settings, todo)


def other(report: Report, settings: Settings) -> None:
    """Times `other_mlstm` over heads, where it supports them."""
    implementation, todo = settings.other_mlstm, []
    for heads in settings.heads:
        for part in ("forward", "gradient"):
            case, name = settings.mlstm_case(part, heads), f"{heads} {part}, {implementation}"
            sizes = (case.B, case.T, case.H, case.K, case.V)
            if reason := refusal(implementation, sizes, case.dtype):
                report.add(name, refused=reason)
            else:
                todo.append((name, case, implementation, None))
    time_calls(report, settings, todo)


def few_heads(report: Report, settings: Settings) -> None:
    """Times one long sequence with few heads, which is split into segments to use all of a GPU."""
    todo: list[Timed] = []
    for part in ("forward", "gradient"):
        case = settings.mlstm_case(part, settings.few_heads, settings.tokens, 1)
        todo.append((f"{settings.few_heads} B=1 {part}", case, settings.mlstm, None))
    time_calls(report, settings, todo)


def slstm(report: Report, settings: Settings) -> None:
    """Times the sLSTM over head dimensions, and the reference at two of them."""
    todo: list[Timed] = []
    for K in settings.slstm_dims:
        for part in ("forward", "gradient"):
            case = settings.slstm_case(part, K)
            names = {settings.slstm}
            names |= {reference("slstm")} if K in (128, 256) else set()
            todo += [(f"K={K} {part}, {name}", case, name, None) for name in sorted(names)]
    time_calls(report, settings, todo)


def tiles(report: Report, settings: Settings) -> None:
    """Times the default tiles of the mLSTM, and variants that are expected to be faster."""
    from experiments.benchmarks import gpu_tiles

    # On a CPU the kernels run in Triton's interpreter.
    context = common.interpreted(lanes=16) if settings.smoke else contextlib.nullcontext()
    todo: list[Timed] = []
    with context:
        for name, tile in tile_variants(settings).items():
            for part in ("gradient",) if name in GRADIENT_ONLY else ("forward", "gradient"):
                case = settings.mlstm_case(part, settings.heads[0])
                fn = gpu_tiles.tile_function(tile, "h", case)
                todo.append((f"{name}, {part}", case, settings.mlstm, fn))
        time_calls(report, settings, todo[:2] if settings.smoke else todo)


def tile_variants(settings: Settings) -> dict[str, Any]:
    """Tiles by name; "table" is the default one."""
    from pallas_kernels.mlstm import backends
    from pallas_kernels.mlstm.triton_tiles import Outputs, States

    _, K, V = settings.heads[0]
    # `Any`: TPU kernels have another type of tile.
    table: Any = backends.triton().tile(K, V, jnp.dtype(settings.dtype), settings.length, None)
    # The left operand over its full width: Triton's layout computes the products of positions once
    # per group of warps.
    h = Outputs(64, 32, inner=256, state_inner=64, width=512, warps=8, stages=2)
    d = h._replace(inner=512, width=256)
    # Two programs of four warps fit on a multiprocessor.
    narrow = h._replace(width=256, warps=4)

    def with_stages(stages):
        parts = ("h", "dq", "dk", "dv")
        deeper = {part: getattr(table, part)._replace(stages=stages) for part in parts}
        return table._replace(**deeper)

    return {
        "table": table,
        "2 stages": with_stages(2),
        "3 stages": with_stages(3),
        "h dv of full width": table._replace(h=h, dv=h),
        "dq dk of full width": table._replace(dq=d, dk=d),
        "h dv of 4 warps": table._replace(h=narrow, dv=narrow),
        "states of 64 x 128": table._replace(states=States(64, 128, 64, 4, 3)),
        "chunk 128": table._replace(chunk=128),
    }


def exported(report: Report, settings: Settings) -> None:
    """Times the same calls as compiled by the Triton release that `export.py` ran with.

    Its files, which contain the assembly, are in `exports` next to the folder of the report.
    """
    calls = []
    for file in sorted((report.folder.parent / "exports").glob("*.export")):
        try:
            calls.append((file.stem, *load_exported(file)))
        except Exception as error:  # a failure must not prevent the other measurements
            report.fail(file.stem, error)
    report.wait()
    for name, shapes, program in calls:

        def timed(shapes=shapes, program=program) -> Record:
            args = jax.jit(lambda: random_arrays(shapes))()
            jax.block_until_ready(program(*args))
            return statistics(kernel_jax.samples(lambda: program(*args), **settings.samples))

        with report.exclusive():
            report.add(name, timed)


def load_exported(file: pathlib.Path) -> tuple[Any, jax.stages.Compiled]:
    """Argument shapes and the compiled program of an exported file."""
    call = export.deserialize(bytearray(file.read_bytes()))
    return call.in_avals, jax.jit(call.call).lower(*call.in_avals).compile()


def random_arrays(shapes) -> list[jax.Array]:
    """Arrays of standard normal numbers."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(k, s.shape).astype(s.dtype) for k, s in zip(keys, shapes, strict=True)
    ]


def time_calls(report: Report, settings: Settings, todo: list[Timed]) -> None:
    """Compiles all calls, waits for the other sections, and times the calls one at a time."""
    calls = []
    for name, case, implementation, fn in todo:
        try:
            calls.append((name, case, prepare(case, implementation, fn, settings)))
        except Exception as error:  # a failure must not prevent the other measurements
            report.fail(name, error)
    report.wait()
    for name, case, timed in calls:
        with report.exclusive():
            report.add(name, lambda case=case, timed=timed: with_bound(case, timed()))


def prepare(
    case: Case, implementation: str, fn: Callable[..., Any] | None, settings: Settings
) -> Callable[[], Record]:
    """Compiles a call; returns a function that times it on new random inputs."""
    program = kernel_jax.compile_case(case, implementation, fn)

    def timed() -> Record:
        call = kernel_jax.bind_inputs(case, implementation, program)
        jax.block_until_ready(call())
        peak = measure.peak_bytes()
        times = kernel_jax.samples(call, **settings.samples)
        return {**statistics([t / case.num_states for t in times]), "peak_bytes": peak}

    return timed


def statistics(seconds: list[float]) -> Record:
    """Median, quartiles and minimum in milliseconds."""
    summary = measure.summary(seconds)
    return {
        "median_ms": 1e3 * summary["median_seconds"],
        "quartiles_ms": [1e3 * t for t in summary["quartiles_seconds"]],
        "fastest_ms": 1e3 * summary["fastest_seconds"],
        "n": summary["repeats"],
    }


def with_bound(case: Case, record: Record) -> Record:
    """Adds the lower bound from the device's data sheet and the share of it; no-op if unknown."""
    kind = jax.devices()[0].device_kind
    bound = kernel_cases.bound_seconds(kernel_cases.work(case), case.dtype, kind)
    if bound is None:
        return record
    return {**record, "bound_ms": 1e3 * bound, "share": 1e3 * bound / record["median_ms"]}
