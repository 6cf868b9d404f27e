"""Bytes or a byte-pair encoding: which gives fewer bits per byte after equal training time?

Published: byte-level models need several times the computation of tokenized ones at equal size (Xue
et al. 2022, "ByT5", arXiv:2105.13626). Expected: at equal parameters and time, the BPE is ahead,
because a step covers about three times the text.

    python experiments/python_sources.py --out sources --max-bytes 320000000
    xlstm-jax data train-tokenizer sources bpe --vocab-size 8192 --max-bytes 60000000
    xlstm-jax data prepare sources prepared/byte
    xlstm-jax data prepare sources prepared/bpe --tokenizer bpe
    python experiments/byte_or_bpe.py --data prepared --minutes 20 --out result.json

`--kinds` and `--seeds` choose runs; two processes can train one kind each, pinned to cores. Both
models have 3.1M parameters and see 256 tokens: 256 bytes, or about 800. The split valid is
evaluated to its last token, so both are measured on the same bytes. The first token of a file is
predicted by neither.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks import measure
from xlstm_jax import cpu
from xlstm_jax.config import to_dict
from xlstm_jax.data import DataConfig, load
from xlstm_jax.evaluate import perplexity
from xlstm_jax.flops import count_params
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig, SLSTMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, fit

CALIBRATION_STEPS = 40
WIDTHS = {"byte": (257, 272), "bpe": (8192, 136)}
"""Vocabulary and width: 3,079,976 and 3,067,640 parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """What to train."""

    data: Path  # folder with the prepared data `byte` and `bpe`
    runs: Path = Path("runs/byte_or_bpe")
    minutes: float = 20.0  # of training, for each run
    seeds: tuple[int, ...] = (0, 1, 2)
    kinds: tuple[str, ...] = ("byte", "bpe")


def experiment(kind: str, source: str, steps: int, seed: int) -> ExperimentConfig:
    """The run of one tokenizer and seed."""
    vocab_size, dim = WIDTHS[kind]
    model = LMConfig(
        vocab_size=vocab_size,
        dim=dim,
        pattern="mmsmmm",
        mlstm=MLSTMConfig(num_heads=4),
        slstm=SLSTMConfig(num_heads=4),
    )
    data = DataConfig(source=source, seq_len=256, batch_size=8, seed=seed)
    train = TrainConfig(
        steps=steps,
        lr=3e-3,
        grad_clip=1.0,
        seed=seed,
        eval_every=max(1, steps // 8),
        eval_batches=40,
        log_every=50,
        checkpoint_every=0,
    )
    return ExperimentConfig(name=f"{kind}_{seed}", model=model, data=data, train=train)


def main(args: Arguments) -> int:
    """Trains all runs and writes one result."""
    cpu.prepare()
    result: dict[str, Any] = measure.run_info("byte_or_bpe") | {
        "minutes": args.minutes,
        "cores_used": len(os.sched_getaffinity(0)),
        "records": [],
    }
    # Once, before the runs: other work on the machine delays them, but does not shorten them.
    steps = {kind: num_steps(args, kind) for kind in args.kinds}
    for seed in args.seeds:
        for kind in args.kinds:
            result["records"].append(record := train(args, kind, steps[kind], seed))
            print(json.dumps(record))
            measure.write(args.out, result)
    return 0


def num_steps(args: Arguments, kind: str) -> int:
    """The number of steps that fit into the time, by the median step of a short run."""
    records: list[dict[str, Any]] = []
    cfg = experiment(kind, str(args.data / kind), CALIBRATION_STEPS, seed=0)
    train = dataclasses.replace(cfg.train, log_every=5, eval_every=0)
    fit(
        dataclasses.replace(cfg, train=train),
        args.runs / f"calibration_{kind}",
        fresh=True,
        on_metrics=lambda step, record: records.append(record),
    )
    times = [record["step_time"] for record in records if "step_time" in record]
    return round(args.minutes * 60 / statistics.median(times))


def train(args: Arguments, kind: str, steps: int, seed: int) -> dict[str, Any]:
    """One run and its evaluation."""
    cfg = experiment(kind, str(args.data / kind), steps, seed)
    start = time.perf_counter()
    state = fit(cfg, args.runs / cfg.name, fresh=True, console=True).state
    seconds = time.perf_counter() - start
    # All of the validation bytes; evaluations during training are samples.
    valid = load(cfg.data, "valid")
    evaluation = perplexity(LM(cfg.model), {"params": state.params}, valid, batch_size=32)
    manifest = json.loads((args.data / kind / "manifest.json").read_text())
    return {
        "kind": kind,
        "seed": seed,
        "config": to_dict(cfg),
        "parameters": count_params(cfg.model),
        "steps": steps,
        "seconds": seconds,
        "train_bytes": sum(shard["num_bytes"] for shard in manifest["splits"]["train"]),
        "evaluation": evaluation._asdict(),
    }


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
