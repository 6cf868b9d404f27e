"""Compares the kernels with the float64 recurrence, and repeated runs bit for bit.

Each record has the relative root-mean-square errors of h, of the state and of every gradient, the
names of those above their limit, and whether three runs agree bit for bit although freed device
memory is overwritten with NaN between them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu.errors import bitwise_equal, error_limit, relative_error
from experiments.benchmarks.gpu.problems import Problem, random_problem
from experiments.benchmarks.gpu.report import Record, Report
from experiments.benchmarks.gpu.settings import MLSTMCheck, Settings, SLSTMCheck, refusal
from experiments.benchmarks.gpu.steps import check_stacked_steps
from xlstm_jax import ops

RUNS = 3


def correctness(report: Report, settings: Settings, part: int = 0, parts: int = 1) -> None:
    """Every `parts`-th check from `part` on, so that each process gets checks of every kind."""
    for name, fn, sizes in checks(settings)[part::parts]:
        report.add(name, fn, sizes=sizes)
    report.wait()


def checks(settings: Settings) -> list[tuple[str, Callable[[], Record], Any]]:
    """Name, function and sizes of every check."""
    listed: list[tuple[str, Callable[[], Record], Any]] = []
    for check in (*settings.mlstm_checks, *settings.slstm_checks):
        op = "mlstm" if isinstance(check, MLSTMCheck) else "slstm"
        fn = functools.partial(compare, check, settings)
        listed.append((f"{op} {check.name}", fn, (*check.sizes, check.dtype)))
    for op in ("mlstm", "slstm"):
        for fusion in settings.step_fusion:
            for unroll in (False, True):
                loop = "unrolled" if unroll else "scanned"
                flag = "default fusion" if fusion is None else "no dynamic-slice fusion"
                fn = functools.partial(
                    check_stacked_steps, op, settings, fusion=fusion, unroll=unroll
                )
                listed.append((f"{op} steps, {loop} layers, {flag}", fn, settings.step_sizes))
    transforms = functools.partial(check_transforms, settings)
    return [*listed, ("mlstm under vmap and checkpoint", transforms, settings.transform_sizes)]


def other(report: Report, settings: Settings) -> None:
    """The checks of `other_mlstm`; those that it refuses have their reason."""
    name = settings.other_mlstm
    for check in settings.mlstm_checks:
        reason = refusal(name, check.sizes, check.dtype)
        record = {} if reason is None else {"refused": reason}
        fn = functools.partial(compare, check, settings, name) if reason is None else None
        sizes = (*check.sizes, check.dtype)
        report.add(f"mlstm {check.name}, {name}", fn, sizes=sizes, **record)
    report.wait()


def compare(
    check: MLSTMCheck | SLSTMCheck, settings: Settings, implementation: str | None = None
) -> Record:
    """Compares an implementation, by default the one under test, with the reference."""
    if implementation is None:
        implementation = settings.mlstm if isinstance(check, MLSTMCheck) else settings.slstm
    problem = random_problem(check, implementation)
    expected, stabilizer = reference_results(problem)
    runs = repeated_results(problem, stabilizer, settings.poison_elements)
    errors = {name: relative_error(x, expected[name]) for name, x in runs[0].items()}
    slack = 100 if getattr(check, "gate_scale", 1) > 4 else 1  # rounding of sums of large gates
    # `not <=` rather than `>`: a NaN error fails as well.
    failed = [name for name, e in errors.items() if not e <= slack * error_limit(name, check.dtype)]
    same_bits = all(bitwise_equal(runs[0], run) for run in runs[1:])
    ok = same_bits and not failed
    return {"errors": errors, "failed": failed, "same_bits": same_bits, "ok": ok}


def reference_results(problem: Problem) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Results and gradients of the reference in float64, and its final stabilizer state."""
    with jax.enable_x64(True):

        def wide(tree):
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)

        args = wide(problem.inputs), wide(problem.state)
        compute = jax.jit(functools.partial(evaluate, problem, problem.reference))
        stabilizer = compute(*args, jnp.zeros_like(args[1].m))[1]
        run = jax.jit(functools.partial(differentiate, problem, problem.reference))
        results = run(*args, stabilizer, wide(problem.loss_weights))
        return jax.tree.map(np.asarray, results), np.asarray(stabilizer)


def repeated_results(
    problem: Problem, stabilizer: np.ndarray, poison_elements: int
) -> list[dict[str, np.ndarray]]:
    """Results and gradients of `RUNS` runs of the implementation under test.

    Between runs an array of NaN is allocated and freed, so that a read out of bounds returns NaN.
    """

    def single(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    args = problem.cast_inputs(), *map(single, (problem.state, stabilizer, problem.loss_weights))
    program = jax.jit(functools.partial(differentiate, problem, problem.tested))
    runs = []
    for _ in range(RUNS):
        runs.append(jax.tree.map(np.asarray, program(*args)))
        poison = jnp.full((poison_elements,), jnp.nan)
        poison.block_until_ready().delete()
    return runs


def evaluate(problem: Problem, compute, inputs, state, stabilizer):
    """h and the final state, rescaled to the stabilizer passed in; and the final stabilizer.

    Implementations may choose different stabilizers, so states compare only at a common one.
    """
    h, last = compute(**inputs, state=state, **problem.flags)
    factor = jnp.exp(last.m - stabilizer)
    outputs = {"h": h}
    for name in problem.stabilized:
        leaf = getattr(last, name)
        outputs[name] = leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))
    return outputs, last.m


def differentiate(problem: Problem, compute, inputs, state, stabilizer, loss_weights):
    """Results, and gradients of their weighted sum for input or leaf `x` under the name `dx`."""
    fn = functools.partial(evaluate, problem, compute, stabilizer=stabilizer)
    outputs, pullback, _ = jax.vjp(fn, inputs, state, has_aux=True)
    grads = pullback({name: w.astype(outputs[name].dtype) for name, w in loss_weights.items()})
    by_name = {**grads[0], **grads[1]._asdict()}
    return outputs | {f"d{name}": x for name, x in by_name.items()}


def check_transforms(settings: Settings) -> Record:
    """Compares gradients under `vmap` and `jax.checkpoint` with those of plain calls."""
    groups, B, T, H, K, V = settings.transform_sizes
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H), (B, T, H)]
    keys = jax.random.split(jax.random.key(1), len(shapes))
    dtype = jnp.dtype(settings.dtype)
    args = [jax.random.normal(k, (groups, *s), dtype) for k, s in zip(keys, shapes, strict=True)]

    def loss(*args):
        h, _ = ops.mlstm(*args, implementation=settings.mlstm)
        return jnp.sum(jnp.square(h.astype(jnp.float32)))

    def gradient(fn):
        return jax.grad(fn, argnums=range(len(shapes)))

    single = jax.jit(gradient(loss))
    expected = [single(*(x[group] for x in args)) for group in range(groups)]
    mapped = jax.jit(jax.vmap(gradient(loss)))(*args)
    rematerialized = jax.jit(gradient(jax.checkpoint(loss)))(*(x[0] for x in args))
    errors = {
        "vmap": max(
            relative_error(m[group], e)
            for group in range(groups)
            for m, e in zip(mapped, expected[group], strict=True)
        ),
        "checkpoint": max(map(relative_error, rematerialized, expected[0])),
    }
    return {"errors": errors, "ok": max(errors.values()) < (1e-5 if settings.smoke else 1e-3)}
