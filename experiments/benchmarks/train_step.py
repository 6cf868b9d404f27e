"""How fast is a train step on a CPU, beside the official PyTorch package on the same machine?

An answer: at least 1.2 times its tokens per second for the large architecture and 4 times for the
first generation; time and memory per token of the chunkwise mLSTM that do not grow with length;
compile time that does not grow with depth.

    python experiments/benchmarks/train_step.py --peer-python PEER/bin/python --out RESULT.json

Without `--peer-python` it measures ours alone. The two take turns, a few steps each, so that a busy
moment of the machine hits both; use a machine that does nothing else.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any, Literal

import tyro

from experiments.benchmarks import cases, depth, length, measure, peer
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.flops import count_params, train_flops

STEPS_IN_TURN = 5
DEMANDED = {"large": 1.2, "v1": 4.0}
"""Our tokens per second over those of the peer."""

Section = Literal["train", "length", "depth"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, print a summary, and write everything as JSON."""

    config: Literal["large", "v1", "all"] = "all"  # whose train step
    sections: tuple[Section, ...] = ("train", "length", "depth")
    peer_python: str | None = None  # an interpreter with torch, xlstm and mlstm_kernels
    repeats: int = 30  # timed steps of each side; calls per length; a tenth as many compilations
    out: pathlib.Path | None = None  # where the JSON goes; None: only the summary is printed

    def __post_init__(self):
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}; 30 is usual.")


def main(options: Options) -> int:
    """Run the chosen sections; 0 unless an option cannot be used."""
    cpu.prepare()
    result = measure.about("train_step")
    try:
        if "train" in options.sections:
            names = tuple(cases.CASES) if options.config == "all" else (options.config,)
            result["train"] = {name: train(name, options) for name in names}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "length" in options.sections:
        result["length"] = length.run(options.repeats)
    if "depth" in options.sections:
        result["depth"] = depth.run(max(1, options.repeats // 10))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(sentences(result)))
    return 0


def train(name: str, options: Options) -> dict[str, Any]:
    """One case: our step, the peer's if there is one, and a matrix product, in turns."""
    case = cases.CASES[name]
    with peer.start(options.peer_python, name) as other:
        return {"config": to_dict(case), **in_turns(name, case, other, options.repeats)}


def in_turns(name: str, case: cases.Case, other: peer.Peer | None, repeats: int) -> dict[str, Any]:
    """Times of both, a few steps each, until each has had `repeats`."""
    advance, program = cases.compiled_step(case)
    product = measure.matrix_product(measure.MATRIX_SIZE)
    measure.seconds(advance, 2)
    ours, theirs, products = [], [], []
    while len(ours) < repeats:
        steps = min(STEPS_IN_TURN, repeats - len(ours))
        products += measure.seconds(product, 3)
        ours += measure.seconds(advance, steps)
        theirs += [] if other is None else other.seconds(steps)
    rate = 2 * measure.MATRIX_SIZE**3 / min(products)
    flops = train_flops(case.model, case.seq_len) * case.batch_size
    row: dict[str, Any] = {
        "parameters": count_params(case.model),
        "flops_per_step": flops,
        "temporary_bytes": measure.temporary_bytes(program),
        "matrix_product_flops_per_second": rate,
        "ours": side(ours, case.tokens, flops, rate),
        "peer": None,
    }
    if other is not None:
        row["peer"] = {**side(theirs, case.tokens, flops, rate), **other.description}
        ratio = row["ours"]["tokens_per_second"] / row["peer"]["tokens_per_second"]
        row |= {"ours_over_peer": ratio, "demanded": DEMANDED[name]}
    return row


def side(times: list[float], tokens: int, flops: float, rate: float) -> dict[str, Any]:
    """Statistics of one side; rates are those of the median step."""
    statistics = measure.summary(times)
    median = statistics["median_seconds"]
    return {
        "tokens_per_second": tokens / median,
        "share_of_matrix_product_rate": flops / median / rate,
        **statistics,
    }


def sentences(result: dict[str, Any]) -> list[str]:
    """The result in lines to read."""
    lines = []
    for name, row in result.get("train", {}).items():
        for who in filter(lambda who: row[who], ("ours", "peer")):
            rates = row[who]
            lines.append(
                f"{name}, {who}: {rates['tokens_per_second']:,.0f} tokens/s, "
                f"{1e3 * rates['median_seconds']:.0f} ms a step (median of {rates['repeats']}), "
                f"{rates['share_of_matrix_product_rate']:.0%} of the matrix-product rate"
            )
        if row["peer"]:
            lines.append(f"{name}: {row['ours_over_peer']:.2f} x, demanded {row['demanded']} x")
    for key, row in result.get("length", {}).get("lengths", {}).items():
        lines.append(
            f"length {key}: {row['nanoseconds_per_token']:,.0f} ns and "
            f"{row['bytes_per_token']:,.0f} bytes per token"
        )
    depths = result.get("depth", {"models": {}, "ratios": {}})
    for name, row in depths["models"].items():
        lines.append(f"compile {name}: {min(row['seconds']):.1f} s")
    lines += [f"compile {name}: {ratio:.2f} x" for name, ratio in depths["ratios"].items()]
    return lines


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
