"""Times the train step of a plain JAX loop on a CPU, compared with the official PyTorch package.

The loop is what a user writes: `jax.jit` of `LM.apply` with optax, no trainer of this library and
no settings of the process. `--prepare` adds the one line `xlstm_jax.cpu.prepare()`, which keeps
freed memory in the process.

    python experiments/benchmarks/user_loop.py --peer-python PEER/bin/python --out RESULT.json

Steps alternate with those of the peer, a few at a time. Besides the time the result has the page
faults and the time in the kernel of one step: XLA allocates the temporary memory of a program at
every call, and by default the C library gets it from the kernel and returns it.
"""

import dataclasses
import functools
import resource
from collections.abc import Callable

import jax
import optax

from experiments.benchmarks import cases, measure, train_step
from tests import workloads
from xlstm_jax import cpu
from xlstm_jax.modules import LM

TARGETS = {"large": 1.4, "v1": 3.5}
"""Minimum ratio of our tokens per second to those of the peer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: rounds of 5 steps are timed, interleaved."""

    prepare: bool = False  # call xlstm_jax.cpu.prepare() first
    peer_python: str | None = None  # interpreter with torch, xlstm and mlstm_kernels


def main(args: Arguments) -> int:
    """Measures every model of `workloads.MODELS` and writes one result."""
    if args.prepare:
        cpu.prepare()
    result = measure.run_info("user_loop") | {"prepare": args.prepare}
    result["train"] = {
        name: train_step.compare(
            name, plain_loop, TARGETS[name], args.repeats, args.peer_python, kernel_costs
        )
        for name in workloads.MODELS
    }
    measure.write(args.out, result)
    return 0


def plain_loop(
    workload: workloads.ModelWorkload,
) -> tuple[Callable[[], jax.Array], jax.stages.Compiled]:
    """A function that runs one more step and returns the loss, and the compiled step."""
    model, batch = LM(workload.model), cases.random_batch(workload)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    )

    def loss_fn(params, tokens, targets):
        logits, _ = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, targets)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = model.init(jax.random.key(0), batch.inputs)["params"]
    opt_state = tx.init(params)
    compiled = step.lower(params, opt_state, batch.inputs, batch.targets).compile()

    def advance() -> jax.Array:
        nonlocal params, opt_state
        params, opt_state, loss = compiled(params, opt_state, batch.inputs, batch.targets)
        return loss

    return advance, compiled


def kernel_costs(advance: Callable[[], jax.Array], steps: int = 5) -> dict[str, float]:
    """Page faults, and seconds of CPU time in user mode and in the kernel, per step."""
    start = resource.getrusage(resource.RUSAGE_SELF)
    measure.seconds(advance, steps)
    end = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "page_faults": (end.ru_minflt - start.ru_minflt) / steps,
        "user_seconds": (end.ru_utime - start.ru_utime) / steps,
        "kernel_seconds": (end.ru_stime - start.ru_stime) / steps,
    }


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
