"""Do the kernels compute what the float64 recurrence computes, the same bits every time?

Each row has the relative root-mean-square error of h, of the state and of every gradient, the names
that exceed their limit, and whether three runs agree bit for bit although the memory they use was
filled with NaN in between.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu.errors import identical, limit, relative
from experiments.benchmarks.gpu.problems import Problem, random_problem
from experiments.benchmarks.gpu.report import Report, Row
from experiments.benchmarks.gpu.settings import MLSTMCheck, Settings, SLSTMCheck
from experiments.benchmarks.gpu.steps import stacked_steps
from xlstm_jax import ops

RUNS = 3


def correctness(report: Report, settings: Settings, part: int = 0, parts: int = 1) -> None:
    """Every `parts`-th row, from `part` on: each process gets some of every kind."""
    for what, fn, sizes in rows(settings)[part::parts]:
        report.add(what, fn, sizes=sizes)
    report.wait()


def rows(settings: Settings) -> list[tuple[str, Callable[[], Row], Any]]:
    """Name, function and sizes of every row."""
    found: list[tuple[str, Callable[[], Row], Any]] = []
    for check in (*settings.mlstm_checks, *settings.slstm_checks):
        op = "mlstm" if isinstance(check, MLSTMCheck) else "slstm"
        fn = functools.partial(compare, check, settings)
        found.append((f"{op} {check.name}", fn, (*check.sizes, check.dtype)))
    for op in ("mlstm", "slstm"):
        for fusion in settings.step_fusion:
            for unrolled in (False, True):
                how = "unrolled" if unrolled else "scanned"
                flag = "default fusion" if fusion is None else "no dynamic-slice fusion"
                fn = functools.partial(stacked_steps, op, settings, fusion=fusion, unroll=unrolled)
                found.append((f"{op} steps, {how} layers, {flag}", fn, settings.step_sizes))
    transforms = functools.partial(transformed, settings)
    return [*found, ("mlstm under vmap and checkpoint", transforms, settings.transform_sizes)]


def compare(check: MLSTMCheck | SLSTMCheck, settings: Settings) -> Row:
    """The tested implementation against the reference."""
    implementation = settings.mlstm if isinstance(check, MLSTMCheck) else settings.slstm
    problem = random_problem(check, implementation)
    expected, stabilizer = by_the_reference(problem)
    runs = by_the_implementation(problem, stabilizer, settings.poison_elements)
    errors = {name: relative(x, expected[name]) for name, x in runs[0].items()}
    slack = 100 if getattr(check, "gate_scale", 1) > 4 else 1  # rounding of sums of large gates
    exceeded = [name for name, e in errors.items() if not e <= slack * limit(name, check.dtype)]
    same_bits = all(identical(runs[0], run) for run in runs[1:])
    ok = same_bits and not exceeded
    return {"errors": errors, "failed": exceeded, "same_bits": same_bits, "ok": ok}


def by_the_reference(problem: Problem) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Results and gradients in float64, and the last stabilizer state."""
    with jax.enable_x64(True):

        def wide(tree):
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)

        args = wide(problem.inputs), wide(problem.state)
        compute = jax.jit(functools.partial(evaluate, problem, problem.reference))
        stabilizer = compute(*args, jnp.zeros_like(args[1].m))[1]
        run = jax.jit(functools.partial(differentiate, problem, problem.reference))
        found = jax.tree.map(np.asarray, run(*args, stabilizer, wide(problem.loss_weights)))
        return found, np.asarray(stabilizer)


def by_the_implementation(
    problem: Problem, stabilizer: np.ndarray, poison_elements: int
) -> list[dict[str, np.ndarray]]:
    """Results and gradients of several runs, between which memory is filled with NaN."""

    def single(tree):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    args = problem.narrow(), *map(single, (problem.state, stabilizer, problem.loss_weights))
    program = jax.jit(functools.partial(differentiate, problem, problem.tested))
    runs = []
    for _ in range(RUNS):
        runs.append(jax.tree.map(np.asarray, program(*args)))
        poison = jnp.full((poison_elements,), jnp.nan)  # what a read out of bounds would find next
        poison.block_until_ready().delete()
    return runs


def evaluate(problem: Problem, compute, inputs, state, stabilizer):
    """h and the last state, scaled as if its stabilizer were the given one; and its own."""
    h, last = compute(**inputs, state=state, **problem.flags)
    factor = jnp.exp(last.m - stabilizer)
    outputs = {"h": h}
    for name in problem.memory:
        leaf = getattr(last, name)
        outputs[name] = leaf * factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))
    return outputs, last.m


def differentiate(problem: Problem, compute, inputs, state, stabilizer, loss_weights):
    """Results, and gradients of their weighted sum by inputs and state, as d and their name."""
    fn = functools.partial(evaluate, problem, compute, stabilizer=stabilizer)
    outputs, pull, _ = jax.vjp(fn, inputs, state, has_aux=True)
    grads = pull({name: w.astype(outputs[name].dtype) for name, w in loss_weights.items()})
    named = {**grads[0], **grads[1]._asdict()}
    return outputs | {f"d{name}": x for name, x in named.items()}


def transformed(settings: Settings) -> Row:
    """Gradients under `vmap` and `jax.checkpoint` are those without them."""
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
    again = jax.jit(gradient(jax.checkpoint(loss)))(*(x[0] for x in args))
    errors = {
        "vmap": max(
            relative(m[group], e)
            for group in range(groups)
            for m, e in zip(mapped, expected[group], strict=True)
        ),
        "checkpoint": max(map(relative, again, expected[0])),
    }
    return {"errors": errors, "ok": max(errors.values()) < (1e-5 if settings.smoke else 1e-3)}
