"""Times train steps, and decoding by context, of xLSTM and the baselines.

Targets: at least the tokens per second of `transformers` for Llama, Mamba and RWKV-4 with the same
weights; a time per token and a state that do not grow with the context for all models but Llama.

    python experiments/benchmarks/baselines.py --peer-python PEER/bin/python --out RESULT.json

Without `--peer-python` only the library is measured. `RESULT.png` is the plot of the decoding step.
Steps of both packages alternate, a few at a time, so that other load affects both alike; use an
otherwise idle machine.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from experiments.benchmarks import baseline_decode, cases, measure, peer
from experiments.benchmarks.train_step import step_rates
from tests import workloads
from xlstm_jax import convert, cpu
from xlstm_jax.config import to_dict
from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.modules import LM
from xlstm_jax.train.losses import language_model_loss

PEERS = {"Llama": 20, "Mamba": 1, "RWKV-4": 5}
"""Models that are compared with `transformers` -> at most as many of its steps, as its loops over
time are slow."""

Timer = Callable[[int], list[float]]

TARGET = 1.0
"""Minimum ratio of our tokens per second to those of the peer."""

PEER = pathlib.Path(__file__).with_name("peer_transformers.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.TimedArguments):
    """`repeats`: train steps of each package, and twice the timed calls of each context."""

    repeats: int = 20
    models: tuple[str, ...] = tuple(workloads.BASELINES)  # names in workloads.BASELINES
    contexts: tuple[int, ...] = baseline_decode.CONTEXTS
    sections: tuple[Literal["train", "decode"], ...] = ("train", "decode")
    peer_python: str | None = None  # interpreter with torch and transformers


def main(args: Arguments) -> int:
    """Runs the selected sections, and writes the result and the plot."""
    cpu.prepare()
    result = measure.run_info("baselines") | {"target": TARGET}
    if "train" in args.sections:
        result["train"] = {
            name: train(name, args.repeats, args.peer_python) for name in args.models
        }
        print(train_table(result["train"]))
    if "decode" in args.sections:
        repeats = max(1, args.repeats // 2)
        result["decode"] = {
            name: baseline_decode.run(name, workloads.BASELINES[name].model, args.contexts, repeats)
            for name in args.models
        }
        print(decode_table(result["decode"]))
        if args.out is not None:
            plot(result["decode"], args.out.with_suffix(".png"))
    measure.write(args.out, result)
    return 0


def train(name: str, repeats: int, peer_python: str | None) -> dict[str, Any]:
    """Times our train step, that of the peer if it has the model, and a matrix product."""
    workload = workloads.BASELINES[name]
    with tempfile.TemporaryDirectory() as folder:
        loss = write_checkpoint(workload, pathlib.Path(folder)) if name in PEERS else None
        python = peer_python if name in PEERS else None
        with peer.start(python, folder, script=PEER) as other:
            advance, program = cases.compiled_step(workload)
            measure.seconds(advance, 2)
            product = measure.matrix_product(measure.MATRIX_SIZE)
            timers: dict[str, Timer] = {
                "product": functools.partial(measure.seconds, product),
                "ours": functools.partial(measure.seconds, advance),
            }
            if other is not None:
                timers["peer"] = at_most(PEERS[name], other.seconds)
            times = measure.interleaved(timers, repeats)
            rate = measure.product_rate(times["product"])
            flops = train_flops(workload.model, workload.seq_len) * workload.batch_size
            rates = functools.partial(step_rates, name, workload.tokens, flops, rate)
            record: dict[str, Any] = {
                "config": to_dict(workload),
                "parameters": count_params(workload.model),
                "flops_per_token": flops / workload.tokens,
                "temporary_bytes": measure.temporary_bytes(program),
                "matrix_product_flops_per_second": rate,
                "ours": rates("ours", times["ours"]),
            }
            if other is not None:
                record["loss"] = loss
                record["peer"] = {**rates("transformers", times["peer"]), **other.description}
                ours, theirs = (record[who]["tokens_per_second"] for who in ("ours", "peer"))
                record["ours_over_peer"] = ours / theirs
    return record


def at_most(count: int, timer: Timer) -> Timer:
    """The timer, which does nothing after this number of calls."""
    left = count

    def timed(calls: int) -> list[float]:
        nonlocal left
        calls = min(calls, left)
        left -= calls
        return timer(calls) if calls else []

    return timed


def write_checkpoint(workload: workloads.ModelWorkload, folder: pathlib.Path) -> float:
    """Writes random weights and a batch for the peer; returns our loss on them."""
    model, batch = LM(workload.model), cases.random_batch(workload)
    params = model.init(jax.random.key(0), batch.inputs[:1, :1])["params"]
    convert.save_hf(folder, workload.model, params)
    np.save(folder / "tokens.npy", np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1))
    _, sums = jax.jit(functools.partial(language_model_loss, model, cfg=cases.TRAIN))(params, batch)
    return float(sums.ce_sum / sums.weight_sum)


def train_table(records: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the train steps."""
    header = ["model", "parameters", "FLOPs per token", "tokens/s", "of the matrix-product rate"]
    lines = []
    for name, record in records.items():
        ours, ratio = record["ours"], record.get("ours_over_peer")
        lines.append(
            [
                name,
                f"{record['parameters'] / 1e6:.2f} M",
                f"{record['flops_per_token'] / 1e6:.1f} M",
                f"{ours['tokens_per_second']:,.0f}",
                f"{ours['share_of_matrix_product_rate']:.0%}",
                "" if ratio is None else f"{ratio:.2f} x",
            ]
        )
    return measure.table([*header, "transformers"], lines)


def decode_table(records: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of milliseconds per token and of the bytes of the state."""
    contexts = [record["context"] for record in next(iter(records.values()))]
    header = [
        "model",
        *(f"{context:,}" for context in contexts),
        "state at the first",
        "at the last",
    ]
    lines = [
        [
            name,
            *(f"{1e3 * record['median_seconds']:.2f} ms" for record in by_context),
            *(f"{by_context[n]['state_bytes'] / 2**20:.2f} MiB" for n in (0, -1)),
        ]
        for name, by_context in records.items()
    ]
    return measure.table(header, lines)


def plot(records: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Plots time per token and bytes of state over the context."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    figure, (time, size) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, (name, by_context) in enumerate(records.items()):
        contexts = [record["context"] for record in by_context]
        style = dict(marker="o", ms=4, lw=2.5 if name == "Llama" or "xLSTM" in name else 1.2)
        style |= dict(color=f"C{number % 10}", ls="--" if number >= 10 else "-", label=name)
        time.plot(contexts, [1e3 * record["median_seconds"] for record in by_context], **style)
        size.plot(contexts, [record["state_bytes"] / 2**20 for record in by_context], **style)
    time.set_ylabel("milliseconds per token")
    size.set_ylabel("state in MiB")
    for axes in (time, size):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens before")
        axes.grid(alpha=0.3)
    size.legend(frameon=False, fontsize=8, ncols=2)
    figure.suptitle("Decoding one token, two CPU cores, float32")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
