"""How well do models predict rare tokens, by how often a token occurs in the training text?

Published, for models of 125 million parameters on Wikitext-103: an LSTM in a Transformer block is
worse on rare tokens than Llama, and xLSTM[1:0] closes the gap. (The values are in a figure only.)

Expected of the size cpu, a byte-pair encoding of 4,096 tokens of the built-in corpus: the mean of
the buckets, weighted by their tokens, is the pooled loss; the loss of every model falls from each
bucket of frequencies to the next. No order of the models is expected at so small a size. The
measured order differs from the published one: after 300 steps Llama is last in every bucket of
tokens with at least 10 occurrences, as in comparison.py.

    python experiments/rare_tokens.py --size cpu        # all models, one JSON file and one plot
    python experiments/rare_tokens.py --models Llama    # one of the models

The tokenizer is trained first, on the training text. All models have four blocks with the mixer in
front of a feed-forward layer (post up-projection), and equal parameters: attention (letter a), an
LSTM (L), an mLSTM (M). Losses are those of the split test, which training does not see. Finished
models are not trained again.

Source: Beck et al. 2024, arXiv:2405.04517, figure 2 (right) and appendix B.1. Sizes: smoke
(seconds), cpu (the experiment), paper (its settings, without early stopping; `--source` names a
folder of `xlstm-jax data prepare` with Wikitext-103).
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Int64

from experiments import comparison, record
from experiments.benchmarks import measure
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig, load, tokenizers
from xlstm_jax.data.corpora import read_corpus
from xlstm_jax.data.train_tokenizer import train_bpe
from xlstm_jax.evaluate import by_frequency, count_tokens, perplexity
from xlstm_jax.evaluate.position import Bucket
from xlstm_jax.evaluate.results import label_of
from xlstm_jax.flops import count_params
from xlstm_jax.modules import LM, LargeConfig, LMConfig
from xlstm_jax.modules.baselines.options import AttentionConfig, LSTMConfig
from xlstm_jax.train import ExperimentConfig
from xlstm_jax.train.checkpoint import restore_params

MODELS: dict[str, dict[str, Any]] = {
    "Llama": dict(pattern="a" * 4, attention=AttentionConfig(ffn_dim=320), final_norm="rms"),
    "LSTM (block)": dict(pattern="L" * 4, lstm=LSTMConfig(ffn_dim=280)),
    "xLSTM[1:0]": dict(pattern="M" * 4, large=LargeConfig(ffn_dim=312), final_norm="rms"),
}
"""Name -> fields of `LMConfig`, at width 96: equal parameters within 1 %."""

VOCAB_SIZE = {"smoke": 300, "cpu": 4096, "paper": 50_304}
EDGES = (0, 1, 10, 100, 1_000, 10_000, 100_000)
"""First training count of each bucket; the last one is open."""

MIN_TOKENS = 200
"""Targets that a bucket needs before its loss is compared with that of its neighbor."""

EVAL_BATCHES = {"smoke": 2, "cpu": 64, "paper": None}
RUNS = pathlib.Path("runs/rare_tokens")

CPU = ExperimentConfig(
    name="xLSTM[1:0]",
    model=LMConfig(vocab_size=VOCAB_SIZE["cpu"], dim=96, **MODELS["xLSTM[1:0]"]),
    data=DataConfig(source="stdlib", seq_len=128, batch_size=16),
    train=dataclasses.replace(comparison.CPU.train, eval_every=100),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(CPU.model, dim=32, vocab_size=VOCAB_SIZE["smoke"]),
    data=dataclasses.replace(CPU.data, source="grammar", seq_len=32, batch_size=4),
    train=comparison.SMOKE.train,
)
PAPER = dataclasses.replace(
    CPU,
    model=dataclasses.replace(
        CPU.model, dim=768, vocab_size=VOCAB_SIZE["paper"], dtype="bfloat16", remat="names"
    ),
    data=DataConfig(source="wikitext103", seq_len=512, batch_size=256),
    train=dataclasses.replace(
        CPU.train, steps=50_000, lr=1e-3, warmup_steps=4_000, eval_every=1_000, eval_batches=None
    ),
)
SIZES = {"smoke": SMOKE, "cpu": CPU, "paper": PAPER}


def config(
    size: str = "cpu",
    name: str = "xLSTM[1:0]",
    source: str | None = None,
    runs: pathlib.Path = RUNS,
) -> ExperimentConfig:
    """The run of one model, a key of `MODELS`.

    Args:
        source: of the data; None: that of the size.
        runs: folder of the runs and of the tokenizer.

    Raises:
        ConfigError: `size` or `name` is unknown.
    """
    record.check_size(size, SIZES)
    record.check_names((name,), MODELS)
    cfg, fields = SIZES[size], dict(MODELS[name])
    if size == "smoke":
        fields["pattern"] = fields["pattern"][0]
    elif size == "paper":  # twelve blocks with the default widths
        fields = dict(pattern=fields["pattern"][0] * 12, final_norm=cfg.model.final_norm)
    model = LMConfig(
        vocab_size=cfg.model.vocab_size,
        dim=cfg.model.dim,
        dtype=cfg.model.dtype,
        remat=cfg.model.remat,
        **fields,
    )
    data = cfg.data if source is None else dataclasses.replace(cfg.data, source=source)
    if size != "paper":  # prepared data have their tokenizer
        data = dataclasses.replace(data, tokenizer=str(tokenizer_of(runs, size)))
    return dataclasses.replace(cfg, name=name, model=model, data=data)


def tokenizer_of(runs: pathlib.Path, size: str) -> pathlib.Path:
    """The folder of the tokenizer of a size."""
    return runs / f"{size}_bpe"


def make_tokenizer(size: str, runs: pathlib.Path) -> None:
    """Trains the tokenizer of a size on its training text, unless it exists."""
    folder = tokenizer_of(runs, size)
    if size == "paper" or folder.exists():
        return
    documents = read_corpus(SIZES[size].data.source).documents["train"]
    # Source code in another encoding than UTF-8 is left out; a few files are.
    texts = (document.data for document in documents if is_utf8(document.data))
    train_bpe(texts, VOCAB_SIZE[size], folder)


def is_utf8(data: bytes) -> bool:
    """Whether bytes are text in UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def evaluate(cfg: ExperimentConfig, size: str, folder: pathlib.Path) -> dict[str, Any]:
    """The loss of a finished run on test text, by training frequency and pooled."""
    model, params = LM(cfg.model), {"params": restore_params(folder)[1]}
    counts = count_tokens(load(cfg.data, "train"), cfg.model.vocab_size)
    test = load(cfg.data, "test")
    options: dict[str, Any] = dict(batch_size=cfg.data.batch_size, max_batches=EVAL_BATCHES[size])
    pooled = perplexity(model, params, test, **options)
    buckets = by_frequency(model, params, test, counts=counts, edges=EDGES, **options)
    return {
        "pattern": cfg.model.pattern,
        "parameters": count_params(cfg.model),
        "pooled": pooled._asdict() | {"perplexity": pooled.perplexity},
        "buckets": [describe(bucket, counts) for bucket in buckets],
    }


def describe(bucket: Bucket, counts: Int64[np.ndarray, "vocab"]) -> dict[str, Any]:
    """A bucket with its name and number of token ids; the loss is None if it has no target."""
    stop = np.inf if bucket.stop is None else bucket.stop
    num_ids = int(np.sum((counts >= bucket.start) & (counts < stop)))
    described = {"label": label_of(bucket), "num_ids": num_ids, **bucket._asdict()}
    return described if bucket.num_tokens else described | {"nats_per_token": None}


def mean_of_buckets(model: dict[str, Any]) -> float:
    """The mean loss of the buckets, weighted by their tokens."""
    filled = [bucket for bucket in model["buckets"] if bucket["num_tokens"]]
    total = sum(bucket["nats_per_token"] * bucket["num_tokens"] for bucket in filled)
    return total / sum(bucket["num_tokens"] for bucket in filled)


def falls(model: dict[str, Any]) -> bool:
    """Whether the loss falls from each bucket with enough tokens to the next."""
    losses = [b["nats_per_token"] for b in model["buckets"] if b["num_tokens"] >= MIN_TOKENS]
    return all(a > b for a, b in itertools.pairwise(losses))


def outcome(models: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Whether each expectation holds, as far as the models are trained."""
    equal = all(
        abs(mean_of_buckets(model) / model["pooled"]["nats_per_token"] - 1) < 1e-5
        for model in models.values()
    )
    checks = {"the weighted mean of the buckets is the pooled loss": equal}
    for name, model in models.items():
        checks[f"the loss of {name} falls with frequency"] = falls(model)
    return checks


def table(models: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of perplexities by training count."""
    first = next(iter(models.values()))
    lines = [["test tokens", *(f"{bucket['num_tokens']:,}" for bucket in first["buckets"]), ""]]
    for name, model in models.items():
        losses = [bucket["nats_per_token"] for bucket in model["buckets"]]
        values = ["" if loss is None else f"{math.exp(loss):,.1f}" for loss in losses]
        lines.append([name, *values, f"{model['pooled']['perplexity']:.2f}"])
    labels = [bucket["label"] for bucket in first["buckets"]]
    return measure.table(["perplexity at training count", *labels, "pooled"], lines)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots perplexity by training count, and the difference of the loss to that of Llama."""
    plt = record.pyplot()
    figure, (values, difference) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    models = result["models"]
    reference = next(iter(models.values()))
    shown = [n for n, b in enumerate(reference["buckets"]) if b["num_tokens"] >= MIN_TOKENS]
    # The size smoke has fewer targets.
    shown = shown or [n for n, b in enumerate(reference["buckets"]) if b["num_tokens"]]
    labels = [f"from {reference['buckets'][n]['start']:,}" for n in shown]
    for number, (name, model) in enumerate(models.items()):
        losses, base = (
            np.array([m["buckets"][n]["nats_per_token"] for n in shown]) for m in (model, reference)
        )
        values.plot(labels, np.exp(losses), "o-", color=f"C{number}", label=name)
        difference.plot(labels, losses - base, "o-", color=f"C{number}")
    values.set_yscale("log")
    values.set_ylabel("test perplexity")
    values.legend(frameon=False)
    difference.set_ylabel(f"nats per token above {next(iter(models))}")
    for axes in (values, difference):
        axes.set_xlabel("occurrences of the token in the training text")
        axes.grid(alpha=0.3)
    figure.suptitle("Loss by training frequency")
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains what is not finished, evaluates all chosen models, writes one JSON file and a plot."""

    size: record.Size = "cpu"
    models: tuple[str, ...] = tuple(MODELS)  # names in MODELS
    source: str | None = None  # of the data; None: that of the size
    runs: pathlib.Path = RUNS  # folder of the runs and of the tokenizer
    out: pathlib.Path = record.RESULTS / "rare_tokens.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    record.check_names(options.models, MODELS)
    make_tokenizer(options.size, options.runs)
    models, cfg = {}, config(options.size, runs=options.runs)
    for name in options.models:
        cfg = config(options.size, name, options.source, options.runs)
        folder = comparison.folder_of(options.runs, options.size, name)
        if not comparison.train(cfg, folder):
            return 1  # stopped; the same command resumes
        models[name] = evaluate(cfg, options.size, folder)
        print(f"{name}: perplexity {models[name]['pooled']['perplexity']:.2f}", flush=True)
    result = record.start("rare_tokens", options.size)
    result |= {"config": to_dict(cfg), "tokenizer": tokenizers.get(cfg.data.tokenizer).sha256}
    result |= {"models": models, "outcome": outcome(models)}
    print(table(models))
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
