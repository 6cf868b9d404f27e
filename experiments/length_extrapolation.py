"""Does a model keep its loss on sequences many times longer than those it was trained on?

Published, for models of 1.3 billion parameters trained at a context of 2048 and evaluated up to
16,384: only the perplexity of xLSTM[1:0] and xLSTM[7:1] stays low; that of Llama, which was not
trained at these rotary positions, explodes. (The values are printed in a figure only.)

Expected of the size cpu, trained at a context of 64: the bits per byte of both xLSTMs at 128 to
1024 are at most 3 % above those at 64; those of Llama rise by at least 10 % at 1024. Mamba and
RWKV-4 are measured too, without an expectation.

    python experiments/length_extrapolation.py --size cpu   # all models, one JSON file and plot
    python experiments/length_extrapolation.py --models Llama   # one of the models
    xlstm-jax train experiments/length_extrapolation.py     # only xLSTM[1:0], as an ordinary run

Models and text are those of comparison.py. Every context is evaluated on the same targets: a window
of 1024 covers the same text as sixteen of 64. A longer context therefore helps a model that can use
it, as fewer tokens follow the start of a window. The second panel of the plot has the loss by
position in the longest window. Finished models are not trained again.

Source: Beck et al. 2024, arXiv:2405.04517, figure 7. Sizes: smoke (seconds), cpu (the experiment),
paper (1.3B presets, 300B tokens; `--source` names a folder of `xlstm-jax data prepare`).
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int64

from experiments import comparison, record
from experiments.benchmarks import measure
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.data import Batch, load
from xlstm_jax.data.loader import eval_index
from xlstm_jax.data.windows import Windows
from xlstm_jax.evaluate import by_position, lengths, perplexity
from xlstm_jax.flops import count_params
from xlstm_jax.modules import LM, presets
from xlstm_jax.train import ExperimentConfig
from xlstm_jax.train.checkpoint import restore_params

MODELS = ("xLSTM[1:0]", "xLSTM[7:1]", "Llama", "Mamba", "RWKV-4")
"""Names in `comparison.MODELS`."""

CONTEXTS = {
    "smoke": (16, 32, 64),
    "cpu": (64, 128, 256, 512, 1024),
    "paper": (2048, 4096, 8192, 16384),
}
"""Size -> lengths of evaluation; the first is that of training, and each divides the last."""

EVAL_TOKENS = {"smoke": 256, "cpu": 2**17, "paper": 2**24}
"""Size -> targets of every evaluation."""

FLAT, RISE = 0.03, 0.1
"""Bounds of the expectations: relative changes of bits per byte."""

PRESETS = {
    "xLSTM[1:0]": ("xlstm_1.3b_1:0", 5e-4),
    "xLSTM[7:1]": ("xlstm_1.3b_7:1", 5e-4),
    "Llama": ("llama_1.3b", 1e-3),
    "Mamba": ("mamba_1.3b", 1e-3),
    "RWKV-4": ("rwkv4_1.3b", 2e-4),
}
"""Name -> preset and peak learning rate at the size paper."""


def config(
    size: str = "cpu", name: str = "xLSTM[1:0]", source: str | None = None
) -> ExperimentConfig:
    """The run of one model, one of `MODELS`; `source` replaces the data of the size.

    Raises:
        ConfigError: `size` or `name` is unknown.
    """
    record.check_names((name,), MODELS)
    cfg = comparison.config(size, name, source)
    context, model, train = CONTEXTS[size][0], cfg.model, cfg.train
    batch_size = cfg.data.seq_len * cfg.data.batch_size // context  # as many tokens
    if size == "cpu":
        train = dataclasses.replace(train, steps=150)
    elif size == "paper":
        preset, lr = PRESETS[name]
        model, batch_size = presets.get(preset), 512
        train = dataclasses.replace(train, steps=300_000, lr=lr, eval_every=10_000)
    data = dataclasses.replace(cfg.data, seq_len=context, batch_size=batch_size)
    return dataclasses.replace(cfg, model=model, data=data, train=train)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some of the windows of a text."""

    windows: Windows
    index: Int64[np.ndarray, "N"]  # of these windows

    shuffle = True

    @property
    def vocab_size(self) -> int:
        """That of the text."""
        return self.windows.vocab_size

    @property
    def tokenizer(self) -> Any:
        """That of the text."""
        return self.windows.tokenizer

    @property
    def description(self) -> dict[str, Any]:
        """That of the text."""
        return self.windows.description

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.index)

    def batch(self, index: Int64[np.ndarray, "B"]) -> Batch:
        """The windows with these numbers in `self.index`."""
        return self.windows.batch(self.index[index])


def same_text(cfg: ExperimentConfig, contexts: tuple[int, ...], count: int) -> list[Part]:
    """Validation windows of every context, with the same `count` targets; each divides the last."""
    longest, parts = contexts[-1], []
    for context in contexts:
        windows = load(dataclasses.replace(cfg.data, seq_len=context), "valid")
        assert isinstance(windows, Windows)
        # Windows of the longest context, spread over the text, then the parts of each.
        num_longest = (windows.store.num_tokens - 1) // longest
        first = eval_index(num_longest, count // longest) * (longest // context)
        index = first[:, None] + np.arange(longest // context)
        parts.append(Part(windows, index.reshape(-1)))
    return parts


def evaluate(cfg: ExperimentConfig, size: str, folder: pathlib.Path) -> dict[str, Any]:
    """The losses of a finished run at every context."""
    contexts = CONTEXTS[size]
    params = {"params": restore_params(folder)[1]}
    model = LM(lengths.with_cache_size(cfg.model, max(contexts)))
    parts = same_text(cfg, contexts, EVAL_TOKENS[size])
    options = dict(document_resets=cfg.train.document_resets)
    losses = {
        context: perplexity(model, params, part, batch_size=-(-16384 // context), **options)
        for context, part in zip(contexts, parts, strict=True)
    }
    buckets = by_position(model, params, parts[-1], batch_size=-(-16384 // contexts[-1]), **options)
    return {
        "pattern": cfg.model.pattern,
        "parameters": count_params(cfg.model),
        "bits_per_byte": {context: loss.bits_per_byte for context, loss in losses.items()},
        "perplexity": {context: loss.perplexity for context, loss in losses.items()},
        "num_tokens": {context: loss.num_tokens for context, loss in losses.items()},
        "by_position": [bucket._asdict() for bucket in buckets],
    }


def changes(model: dict[str, Any]) -> dict[int, float]:
    """Context -> relative change of bits per byte from the training context."""
    first, *_ = model["bits_per_byte"].values()
    return {context: value / first - 1 for context, value in model["bits_per_byte"].items()}


def outcome(models: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds, as far as the models are evaluated."""
    checks = {}
    for name in ("xLSTM[1:0]", "xLSTM[7:1]"):
        if name in models:
            worst = max(changes(models[name]).values())
            checks[f"{name} rises by at most {FLAT:.0%} at every context"] = worst <= FLAT
    if "Llama" in models:
        last = list(changes(models["Llama"]).values())[-1]
        checks[f"Llama rises by at least {RISE:.0%} at the longest context"] = last >= RISE
    return checks


def table(models: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of bits per byte by context, with the change at the last one."""
    contexts = [str(context) for context in next(iter(models.values()))["bits_per_byte"]]
    lines = [
        [
            name,
            *(f"{value:.3f}" for value in model["bits_per_byte"].values()),
            f"{list(changes(model).values())[-1]:+.1%}",
        ]
        for name, model in models.items()
    ]
    return measure.table(["model", *contexts, "change"], lines)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots bits per byte over context, and over the position in the longest window."""
    plt = record.pyplot()
    figure, (by_context, positions) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (name, model) in enumerate(result["models"].items()):
        style = dict(color=f"C{number}", lw=2.5 if name.startswith("xLSTM") else 1.4, ms=4)
        losses = model["bits_per_byte"]
        by_context.plot(list(losses), list(losses.values()), "o-", label=name, **style)
        buckets = [bucket for bucket in model["by_position"] if bucket["start"] >= 1]
        middle = [math.sqrt(bucket["start"] * bucket["stop"]) for bucket in buckets]
        bits = [bucket["nats_per_token"] / math.log(2) for bucket in buckets]
        positions.plot(middle, bits, "o-", **style)
    trained = min(next(iter(result["models"].values()))["bits_per_byte"])
    for axes in (by_context, positions):
        axes.axvline(trained, color="0.5", ls=":", lw=1.2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
    by_context.set_xlabel("context of evaluation (dotted: of training)")
    by_context.set_ylabel("validation bits per byte")
    by_context.legend(frameon=False)
    positions.set_xlabel("position in the longest window")
    positions.set_ylabel("bits per token")
    figure.suptitle("Trained on short sequences, evaluated on long ones")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains what is not finished, evaluates all chosen models, writes one JSON file and a plot."""

    size: record.Size = "cpu"
    models: tuple[str, ...] = MODELS  # names in MODELS
    source: str | None = None  # of the data; None: that of the size
    runs: pathlib.Path = pathlib.Path("runs/length_extrapolation")  # folder of all runs
    out: pathlib.Path = record.RESULTS / "length_extrapolation.json"  # the plot is next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    record.check_names(options.models, MODELS)
    models = {}
    for name in options.models:
        cfg = config(options.size, name, options.source)
        folder = comparison.folder_of(options.runs, options.size, name)
        if not comparison.train(cfg, folder):
            return 1  # stopped; the same command resumes
        models[name] = evaluate(cfg, options.size, folder)
        bits = ", ".join(f"{value:.3f}" for value in models[name]["bits_per_byte"].values())
        print(f"{name}: {bits} bits per byte at {CONTEXTS[options.size]}", flush=True)
    result = record.start("length_extrapolation", options.size)
    result |= {"config": to_dict(config(options.size)), "models": models}
    result["outcome"] = outcome(models)
    print(table(models))
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
