"""Times of train steps and of decoding, with complete models."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.benchmarks import cases, kernel_cases, measure
from experiments.benchmarks.gpu.report import Record, Report
from experiments.benchmarks.gpu.settings import Settings
from experiments.benchmarks.gpu.speed import statistics
from experiments.benchmarks.kernel_cases import Work
from tests.workloads import ModelWorkload
from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.generate import prepare_params
from xlstm_jax.modules import LM, LMConfig, param_shapes
from xlstm_jax.modules.stack import unstack_layers
from xlstm_jax.train import metrics
from xlstm_jax.train.metrics import Totals


def train(report: Report, settings: Settings) -> None:
    """Times train steps, optimizer update included."""
    calls = []
    for name, workload in settings.models:
        try:
            program = cases.make_program(workload)
            calls.append((name, workload, program, program.compile()))
        except Exception as error:  # a failure must not prevent the other measurements
            report.fail(name, error)
    report.wait()
    for name, workload, program, compiled in calls:
        with report.exclusive():
            start = functools.partial(cases.start_training, program, compiled, workload)
            report.add(name, functools.partial(train_steps, workload, start, settings.train_steps))


def train_steps(
    workload: ModelWorkload, start: Callable[[], Callable[[], Totals]], num_steps: int
) -> Record:
    """Statistics of all steps after the first two, and the rates of the median step."""
    advance, seconds, totals = start(), [], metrics.empty()
    for _ in range(num_steps):
        begin = time.perf_counter()
        totals = jax.block_until_ready(advance())
        seconds.append(time.perf_counter() - begin)
    times = statistics(seconds[2:])
    rate = workload.tokens / (times["median_ms"] / 1e3)
    flops = train_flops(workload.model, workload.seq_len) * workload.batch_size
    bound = bound_seconds(Work(flops, 0))
    return {
        **times,
        "B": workload.batch_size,
        "T": workload.seq_len,
        "parameters": count_params(workload.model),
        "tokens_per_s": rate,
        "mfu": bound and 1e3 * bound / times["median_ms"],
        "loss": metrics.summarize(totals)["loss"],  # mean over all steps
        "peak_bytes": measure.peak_bytes(),
    }


def decode(report: Report, settings: Settings) -> None:
    """Times decoding with prepared bfloat16 weights; records the share of the memory bandwidth.

    The step kernel reads slices of a joined projection, so XLA's dynamic-slice fusion matters: with
    it, the state is copied; with it and without.
    """
    cfg, steps = settings.decode_model, settings.decode_steps
    model, shapes, calls = LM(cfg), prepared_shapes(cfg), []
    variants = {"default": {}}
    if not settings.smoke:
        variants["no dynamic-slice fusion"] = {"xla_gpu_enable_dynamic_slice_fusion": False}
    generate = jax.jit(functools.partial(decode_tokens, model, steps), donate_argnums=2)
    for B in (1,) if settings.smoke else (1, 32):
        state = jax.eval_shape(functools.partial(initial_state, model, B))
        lowered = generate.lower(shapes, jax.ShapeDtypeStruct((B, 1), jnp.int32), state)
        for name, flags in variants.items():
            try:
                program = lowered.compile(compiler_options=flags)
                calls.append((f"B={B}, {name}", B, program))
            except Exception as error:  # a failure must not prevent the other measurements
                report.fail(f"B={B}, {name}", error)
    report.wait()
    with report.exclusive():
        params = random_params(shapes)
        for name, B, program in calls:
            report.add(name, functools.partial(decode_steps, model, params, program, B, steps))


def decode_tokens(model: LM, steps: int, params, token, state):
    """Decodes `steps` tokens greedily; returns the last token and the state."""

    def body(carry, _):
        token, state = carry
        logits, state = model.apply({"params": params}, token, state=state)
        token = jnp.argmax(logits[:, -1], -1).astype(jnp.int32)[:, None]
        return (token, state), None

    return jax.lax.scan(body, (token, state), None, length=steps)[0]


def decode_steps(model: LM, params, program, B: int, steps: int) -> Record:
    """Statistics of one token, and the share of the memory bandwidth that it achieves.

    The minimum traffic counts: all parameters are read once, the state is read and written once.
    """
    state, token, seconds = initial_state(model, B), jnp.zeros((B, 1), jnp.int32), []
    for _ in range(6):
        start = time.perf_counter()
        token, state = jax.block_until_ready(program(params, token, state))
        seconds.append((time.perf_counter() - start) / steps)
    times = statistics(seconds[1:])
    moved = num_bytes(params) + 2 * num_bytes(state)
    bound = bound_seconds(Work(0, moved))
    return {
        **times,
        "bytes_per_token": moved,
        "tokens_per_s": 1e3 * B / times["median_ms"],
        "share_of_bandwidth": bound and 1e3 * bound / times["median_ms"],
        "largest_of_state": max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(state)),
    }


def initial_state(model: LM, B: int):
    """The initial state, with layers in lists."""
    return unstack_layers(model.cfg.pattern, model.init_state(B))


def prepared_shapes(cfg: LMConfig):
    """Shapes of the parameters that are prepared for decoding."""
    variables = {"params": param_shapes(cfg)}
    return jax.eval_shape(functools.partial(prepare_params, LM(cfg)), variables)["params"]


def random_params(shapes):
    """Random parameters of these shapes.

    Each array is compiled separately: one program for all would hold float32 temporaries.
    """
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def make(key, shape):
        scale = 0.02 if len(shape.shape) > 1 else 1
        return (scale * jax.random.normal(key, shape.shape, shape.dtype)).astype(shape.dtype)

    pairs = zip(keys, leaves, strict=True)
    return tree.unflatten([jax.jit(functools.partial(make, shape=s))(k) for k, s in pairs])


def bound_seconds(work: Work) -> float | None:
    """Lower bound of the time of bfloat16 work; None if the peaks of the device are not known."""
    return kernel_cases.bound_seconds(work, "bfloat16", jax.devices()[0].device_kind)


def num_bytes(tree) -> int:
    """Total size of the arrays of a tree, in bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
