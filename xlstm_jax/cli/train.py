"""`xlstm-jax train CONFIG.py`: trains, or resumes a run, and prints its final metrics."""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax

from xlstm_jax import data
from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DIVERGED, DONE
from xlstm_jax.data.loader import eval_index
from xlstm_jax.data.windows import Windows
from xlstm_jax.flops import train_flops
from xlstm_jax.generate import Sampler
from xlstm_jax.generate.text import stream_text
from xlstm_jax.modules.lm import LM
from xlstm_jax.sharding.distributed import Processes, init_distributed
from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.run import FitResult, fit

# Of the sample at the end; a character may take several tokens.
PROMPT_TOKENS, SAMPLE_CHARACTERS, MOST_TOKENS = 32, 300, 1200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(options.WithConfig):
    """Trains a model, or resumes the run in its directory."""

    run_dir: Path | None = None  # None: runs/NAME for NAME.py; a run given as config is resumed
    fresh: bool = False  # discard the run in that directory
    processes: Processes = Processes()  # of several, which one this is


def run(args: list[str]) -> int:
    """Raises ConfigError if the run cannot start; nothing on disk has changed then."""
    chosen = options.parse_with_config("train", Train, args)
    init_distributed(chosen.processes)
    cfg = chosen.experiment
    run_dir = _default_run_dir(chosen.config) if chosen.run_dir is None else chosen.run_dir
    flops = cfg.data.batch_size * train_flops(cfg.model, cfg.data.seq_len)
    try:
        result = fit(cfg, run_dir, fresh=chosen.fresh, console=True, flops_per_step=flops)
    except DivergedError as error:
        print(f"xlstm-jax: {error}", file=sys.stderr)
        return DIVERGED
    if jax.process_index() > 0:  # the first one speaks for all
        return DONE
    # A run may also be stopped after its last step, during the final evaluation.
    measured_at = (result.evaluation or {}).get("step")
    if not result.finished or (measured_at != result.step and cfg.train.eval_every):
        steps = f"step {result.step} of {cfg.train.steps}"
        console.say(f"\nStopped at {steps} and saved; the same command resumes it.\n")
        return DONE
    valid = data.load(cfg.data, "valid") if cfg.train.eval_every else None
    rows = {"held out": "not measured, as train.eval_every is 0"}
    metrics = result.evaluation
    if metrics is not None and valid is not None:
        measures = [f"{metrics['valid_loss']:.4f} nats per token"]
        if "valid_bits_per_byte" in metrics:
            measures.insert(0, f"{metrics['valid_bits_per_byte']:.4f} bits per byte")
        count, limit = len(valid), cfg.train.eval_batches
        if limit is not None:
            count = len(eval_index(count, limit * cfg.data.batch_size))
        part = f"over all {count:,} windows"
        if count < len(valid):
            part = (
                f"over {count:,} of {len(valid):,} windows, spread evenly; "
                f"`xlstm-jax evaluate {run_dir}` measures all"
            )
        rows["held out"] = ", ".join([*measures, part])
    rows["checkpoint"] = str(run_dir / checkpoint.FOLDER / str(result.step))
    rows["picture"] = str(run_dir / rundir.CURVE)
    console.say("\n")
    console.facts(rows)
    if isinstance(valid, Windows) and jax.process_count() == 1:  # else no process has all params
        _show_sample(cfg, result, valid)
    return DONE


def _default_run_dir(config: Path) -> Path:
    if config.is_dir():
        return config
    return config.parent if config.suffix == ".json" else Path("runs", config.stem)


def _show_sample(cfg: ExperimentConfig, result: FitResult, windows: Windows) -> None:
    """Shows how the model continues the held-out text."""
    prompt = windows.tokenizer.decode(windows.tokens[:PROMPT_TOKENS])
    console.say(f"\n{SAMPLE_CHARACTERS} characters that the model writes after {prompt!r}:\n\n")
    parts = stream_text(
        LM(cfg.model),
        {"params": result.state.params},
        windows.tokenizer,
        prompt,
        max_new_tokens=MOST_TOKENS,
        # The end of a document would be the end of the sample.
        sampler=Sampler(temperature=0.8, never=(windows.tokenizer.eos_id,)),
        key=jax.random.key(cfg.train.seed),
    )
    characters = itertools.islice(itertools.chain.from_iterable(parts), SAMPLE_CHARACTERS)
    for character in characters:
        console.say(character)
    console.say("\n")
