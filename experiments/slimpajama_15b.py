"""How do models of about 400M parameters compare after training on 15B tokens of SlimPajama?

Published validation perplexity: xLSTM[1:0] 13.43, xLSTM[7:1] 13.48, Mamba 13.70, Llama 14.25,
RWKV-4 15.62. The answer at the size paper is whether our models have this order at step 28,170. The
size cpu tests the pipeline, not the order: the built-in text is prepared as SlimPajama would be,
and a small model of each family is trained on it by ordinary runs.

Expected at the size cpu: every model ends below 4 bits per byte of validation text (byte
frequencies alone: about 4.8).

    python experiments/slimpajama_15b.py --size cpu
    python experiments/slimpajama_15b.py --size paper --data PREPARED
    xlstm-jax train experiments/slimpajama_15b.py --size paper --data.source PREPARED --mesh.fsdp 8
    xlstm-jax train experiments/slimpajama_15b.py --size paper:llama --data.source PREPARED

PREPARED is a folder of `xlstm-jax data prepare` with the tokenizer of GPT-2; models have 50,304
tokens. The comparison is at the end of an epoch: the schedule has 30,000 steps, and
`xlstm-jax evaluate RUN --step 28170` evaluates all validation text at that step.

Source: Beck et al. 2024, arXiv:2405.04517, table 1 and appendix B.2. Sizes: smoke (seconds), cpu
(minutes), paper (published). `--size SIZE:MODEL` of `xlstm-jax train` selects a model.
"""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from experiments import language_models, record
from xlstm_jax import cpu
from xlstm_jax.data.corpora import read_corpus
from xlstm_jax.data.prepare.config import PrepareConfig
from xlstm_jax.data.prepare.run import prepare
from xlstm_jax.train import ExperimentConfig, fit

SIZES = ("smoke", "cpu", "paper")
PERPLEXITY = {
    "llama": 14.25,
    "mamba": 13.70,
    "rwkv4": 15.62,
    "xlstm_1:0": 13.43,
    "xlstm_7:1": 13.48,
}
"""Family -> published validation perplexity."""

MAX_BITS = 4.0
RESULTS = pathlib.Path(__file__).parent / "results"


def config(size: str = "cpu", family: str = "xlstm_1:0") -> ExperimentConfig:
    """The run of a family; `size` may be SIZE:FAMILY.

    Raises:
        ConfigError: the size or the family is unknown.
    """
    size, family = language_models.parse_size(size, SIZES, tuple(PERPLEXITY), family)
    name = f"slimpajama_15b_{size}_{family}"
    if size == "paper":
        return language_models.published(name, language_models.published_preset(family, "350m"))
    small = dict(cpu=(64, 8, 3e-3), smoke=(16, 8, 3e-3))
    dim, blocks, lr = small[size]
    train = dataclasses.replace(
        language_models.SMALL_TRAIN, steps=200, lr=lr, log_every=20, eval_every=100, eval_batches=40
    )
    data = language_models.SMALL_DATA
    if size == "smoke":
        train = dataclasses.replace(train, steps=4, log_every=2, eval_every=2, eval_batches=2)
        data = language_models.SMOKE_DATA
    model = language_models.small_model(family, dim, blocks)
    return ExperimentConfig(name=name, model=model, data=data, train=train)


def prepare_builtin(corpus: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes a built-in corpus as JSON lines and prepares it; returns the prepared folder."""
    raw, prepared = folder / f"text_{corpus}", folder / f"prepared_{corpus}"
    if not (prepared / "manifest.json").is_file():
        raw.mkdir(parents=True, exist_ok=True)
        for split, documents in read_corpus(corpus).documents.items():
            texts = (document.data.decode(errors="replace") for document in documents)
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (raw / f"{split}.jsonl").write_text("".join(lines))
        prepare(PrepareConfig(source=str(raw)), prepared, num_workers=1)
    return prepared


def train_small(cfg: ExperimentConfig, runs: pathlib.Path) -> dict[str, Any]:
    """Trains one small model by an ordinary run on prepared data; returns its record."""
    source = prepare_builtin(cfg.data.source, runs)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=str(source)))
    result = fit(cfg, runs / cfg.name)
    if not result.finished or result.evaluation is None:
        sys.exit(f"{cfg.name}: stopped and saved; the same command resumes it")
    bits = result.evaluation["valid_loss"] / math.log(2)
    print(f"{cfg.name}: {bits:.4f} bits per token", flush=True)
    return {"bits_per_token": round(bits, 4), "steps": cfg.train.steps}


def outcome(size: str, measured: dict[str, Any]) -> dict[str, bool]:
    """Whether each expectation holds, of the models that are measured."""
    if size != "paper":
        return {
            f"{language_models.LABELS[name]} below {MAX_BITS:g} bits per byte": model[
                "bits_per_token"
            ]
            < MAX_BITS
            for name, model in measured.items()
        }
    known = {name: m["perplexity"] for name, m in measured.items() if m["perplexity"] is not None}
    ordered = sorted(known, key=PERPLEXITY.__getitem__)
    pairs = zip(ordered, ordered[1:], strict=False)
    return {
        f"{language_models.LABELS[a]} below {language_models.LABELS[b]}": known[a] < known[b]
        for a, b in pairs
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains one model after the other, or resumes it, and writes one JSON file."""

    size: record.Size = "cpu"
    families: tuple[str, ...] = tuple(PERPLEXITY)  # names in PERPLEXITY
    data: pathlib.Path = pathlib.Path(language_models.DATA)  # prepared, of the size paper
    runs: pathlib.Path = pathlib.Path("runs/slimpajama_15b")  # folder of the runs
    out: pathlib.Path = RESULTS / "slimpajama_15b.json"


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    configs = {family: config(options.size, family) for family in options.families}
    result = record.start("slimpajama_15b", options.size)
    if options.size == "paper":
        step = language_models.COMPARED_STEP
        values = language_models.train_published(configs, options.data, options.runs, step)
        measured = {
            family: {"perplexity": value, "published": PERPLEXITY[family]}
            for family, value in values.items()
        }
    else:
        measured = {name: train_small(cfg, options.runs) for name, cfg in configs.items()}
    result |= {"models": measured, "outcome": outcome(options.size, measured)}
    return record.save(result, options.out)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
