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
from typing import Any

import jax
import optax

from experiments.benchmarks import cases, measure, peer
from experiments.benchmarks.train_step import step_rates
from tests import workloads
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.flops import train_flops
from xlstm_jax.modules import LM

TARGETS = {"large": 1.4, "v1": 3.5}
"""Minimum ratio of our tokens per second to those of the peer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: rounds of 5 steps are timed in turns."""

    prepare: bool = False  # call xlstm_jax.cpu.prepare() first
    peer_python: str | None = None  # interpreter with torch, xlstm and mlstm_kernels


def main(args: Arguments) -> int:
    """Measures every model of `workloads.MODELS` and writes one result."""
    if args.prepare:
        cpu.prepare()
    result = measure.run_info("user_loop") | {"prepare": args.prepare}
    result["train"] = {
        name: compare(name, args.repeats, args.peer_python) for name in workloads.MODELS
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


def compare(name: str, repeats: int, peer_python: str | None) -> dict[str, Any]:
    """Times our loop, the peer's if there is one, and a matrix product, alternating."""
    workload = workloads.MODELS[name]
    with peer.start(peer_python, name) as other:
        advance, program = plain_loop(workload)
        measure.seconds(advance, 2)
        product = functools.partial(measure.seconds, measure.matrix_product(measure.MATRIX_SIZE))
        timers = {"product": product, "ours": functools.partial(measure.seconds, advance)}
        times = measure.interleaved(timers | ({"peer": other.seconds} if other else {}), repeats)
        rate = measure.product_rate(times["product"])
        flops = train_flops(workload.model, workload.seq_len) * workload.batch_size
        rates = functools.partial(step_rates, name, workload.tokens, flops, rate)
        record: dict[str, Any] = {
            "config": to_dict(workload),
            "temporary_bytes": measure.temporary_bytes(program),
            "matrix_product_flops_per_second": rate,
            "ours": rates("ours", times["ours"]) | kernel_costs(advance),
            "peer": None,
        }
        if other is not None:
            record["peer"] = {**rates("peer", times["peer"]), **other.description}
            ratio = record["ours"]["tokens_per_second"] / record["peer"]["tokens_per_second"]
            record |= {"ours_over_peer": ratio, "target": TARGETS[name]}
            print(f"{name}: {ratio:.2f} x, target {TARGETS[name]} x")
        return record


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
