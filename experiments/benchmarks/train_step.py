"""Times train steps on a CPU, compared with the official PyTorch package.

Targets, on the same machine: at least 1.2 times its tokens per second for the large architecture
and 4 times for the first generation; time and memory per token of the chunkwise mLSTM that do not
grow with length; compile time that does not grow with depth.

    python experiments/benchmarks/train_step.py --peer-python PEER/bin/python --out RESULT.json

Without `--peer-python` only xlstm-jax is measured. Steps of both alternate, a few at a time, so
that other load affects both alike; use an otherwise idle machine.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from experiments.benchmarks import cases, depth, length, measure, peer
from tests import workloads
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.flops import count_params, train_flops

TARGETS = {"large": 1.2, "v1": 4.0}
"""Minimum ratio of our tokens per second to those of the peer."""

Advance = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: train steps of each package, calls per length, and 10 times the compilations."""

    config: Literal["large", "v1", "all"] = "all"  # workloads of the section `train`
    sections: tuple[Literal["train", "length", "depth"], ...] = ("train", "length", "depth")
    peer_python: str | None = None  # interpreter with torch, xlstm and mlstm_kernels


def main(args: Arguments) -> int:
    """Runs the selected sections and writes one result."""
    cpu.prepare()
    result = measure.run_info("train_step")
    if "train" in args.sections:
        names = tuple(workloads.MODELS) if args.config == "all" else (args.config,)
        result["train"] = {name: train(name, args.repeats, args.peer_python) for name in names}
    if "length" in args.sections:
        result["length"] = length.run(args.repeats)
    if "depth" in args.sections:
        result["depth"] = depth.run(max(1, args.repeats // 10))
    measure.write(args.out, result)
    return 0


def train(name: str, repeats: int, peer_python: str | None) -> dict[str, Any]:
    """The record of `compare` for the trainer's step."""
    return compare(name, cases.compiled_step, TARGETS[name], repeats, peer_python)


def compare(
    name: str,
    make_step: Callable[[workloads.ModelWorkload], tuple[Advance, jax.stages.Compiled]],
    target: float,
    repeats: int,
    peer_python: str | None,
    costs: Callable[[Advance], dict[str, float]] = lambda advance: {},
) -> dict[str, Any]:
    """Times our step, the peer's if one is given, and a matrix product, alternating.

    `make_step` returns a function that runs one more step, and its program; `target` is the minimum
    ratio of our tokens per second to those of the peer; `costs` measures more of our step.
    """
    workload = workloads.MODELS[name]
    with peer.start(peer_python, name) as other:
        advance, program = make_step(workload)
        measure.seconds(advance, 2)
        product = measure.matrix_product(measure.MATRIX_SIZE)
        timers = {
            "product": functools.partial(measure.seconds, product),
            "ours": functools.partial(measure.seconds, advance),
        }
        times = measure.interleaved(timers | ({"peer": other.seconds} if other else {}), repeats)
        rate = measure.product_rate(times["product"])
        flops = train_flops(workload.model, workload.seq_len) * workload.batch_size
        rates = functools.partial(step_rates, name, workload.tokens, flops, rate)
        record: dict[str, Any] = {
            "config": to_dict(workload),
            "parameters": count_params(workload.model),
            "flops_per_step": flops,
            "temporary_bytes": measure.temporary_bytes(program),
            "matrix_product_flops_per_second": rate,
            "ours": rates("ours", times["ours"]) | costs(advance),
            "peer": None,
        }
        if other is not None:
            record["peer"] = {**rates("peer", times["peer"]), **other.description}
            ratio = record["ours"]["tokens_per_second"] / record["peer"]["tokens_per_second"]
            record |= {"ours_over_peer": ratio, "target": target}
            print(f"{name}: {ratio:.2f} x, target {target} x")
        return record


def step_rates(
    name: str, tokens: int, flops: float, rate: float, who: str, times: Sequence[float]
) -> dict[str, Any]:
    """Prints and returns statistics of the steps of `who`; rates are those of the median step."""
    statistics = measure.summary(times)
    median = statistics["median_seconds"]
    share = flops / median / rate
    print(
        f"{name}, {who}: {tokens / median:,.0f} tokens/s, {1e3 * median:.1f} ms a step "
        f"(median of {len(times)}), {share:.0%} of the matrix-product rate"
    )
    return {
        "tokens_per_second": tokens / median,
        "share_of_matrix_product_rate": share,
        **statistics,
    }


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
