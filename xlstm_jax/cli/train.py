"""`xlstm-jax train CONFIG.py`: starts or resumes a run and prints its final metrics."""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax

from xlstm_jax import data
from xlstm_jax.cli import console, convert, options
from xlstm_jax.cli.exit_codes import DIVERGED, DONE
from xlstm_jax.config import ConfigError
from xlstm_jax.convert import tensors
from xlstm_jax.convert.hf import why_not_exportable
from xlstm_jax.data.loader import eval_index
from xlstm_jax.data.windows import Windows
from xlstm_jax.flops import train_flops
from xlstm_jax.generate import Sampler
from xlstm_jax.generate.text import stream_text
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.modules.lm import LM
from xlstm_jax.sharding.distributed import Processes, init_distributed
from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.outputs import Exporter
from xlstm_jax.train.processes import exit_on_signal, extra, log
from xlstm_jax.train.run import FitResult, fit
from xlstm_jax.train.state import eval_params
from xlstm_jax.typing import PyTree

# Of the sample after training; a character may take several tokens.
PROMPT_TOKENS, SAMPLE_CHARACTERS, MAX_SAMPLE_TOKENS = 32, 300, 1200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(options.ConfigCommand):
    """Trains a model, or resumes the run in its directory."""

    run_dir: Path | None = None  # None: runs/NAME for NAME.py, or the run that CONFIG names
    fresh: bool = False  # discard the existing run in that directory
    processes: Processes = Processes()  # for runs in several processes


def run(argv: list[str]) -> int:
    """Runs `train`; raises ConfigError, with the disk unchanged, if its input is invalid."""
    args = options.parse_with_config("train", Train, argv)
    init_distributed(args.processes)
    cfg = args.experiment
    run_dir = rundir.expand(_default_run_dir(args.config) if args.run_dir is None else args.run_dir)
    flops = cfg.data.batch_size * train_flops(cfg.model, cfg.data.seq_len)
    try:
        with exit_on_signal():
            result = fit(
                cfg,
                run_dir,
                fresh=args.fresh,
                console=True,
                flops_per_step=flops,
                exporter=_exporter(cfg, run_dir),
            )
    except DivergedError as error:
        print(f"xlstm-jax: {error}", file=sys.stderr)
        return DIVERGED
    if jax.process_index() > 0:  # process 0 prints for all
        return DONE
    # A signal may also stop a run after its last step, during the final evaluation.
    evaluated_at = (result.evaluation or {}).get("step")
    if not result.finished or (evaluated_at != result.step and cfg.train.eval_every):
        steps = f"step {result.step} of {cfg.train.steps}"
        console.write(f"\nStopped at {steps} and saved; the same command resumes it.\n")
        return DONE
    valid = data.load(cfg.data, "valid") if cfg.train.eval_every else None
    fields = {"validation": "not evaluated: train.eval_every is 0"}
    metrics = result.evaluation
    if metrics is not None and valid is not None:
        losses = [f"{metrics['valid_loss']:.4f} nats per token"]
        if "valid_bits_per_byte" in metrics:
            losses.insert(0, f"{metrics['valid_bits_per_byte']:.4f} bits per byte")
        count, limit = len(valid), cfg.train.eval_batches
        if limit is not None:
            count = len(eval_index(count, limit * cfg.data.batch_size))
        scope = f"over all {count:,} windows"
        if count < len(valid):
            scope = (
                f"over {count:,} of {len(valid):,} windows, spread evenly; "
                f"`xlstm-jax evaluate {run_dir}` evaluates all"
            )
        fields["validation"] = ", ".join([*losses, scope])
    fields["checkpoint"] = str(run_dir / checkpoint.FOLDER / str(result.step))
    if (run_dir / rundir.CURVE).exists():
        fields["loss curve"] = str(run_dir / rundir.CURVE)
    console.write("\n")
    console.print_fields(fields)
    # With several processes, parameters may be sharded over all of them.
    if isinstance(valid, Windows) and jax.process_count() == 1:
        with extra("the sample"):
            _show_sample(cfg, result, valid)
    return DONE


def _exporter(cfg: ExperimentConfig, run_dir: Path) -> Exporter | None:
    """Writes parameters as `convert run-to-hf` does; None without `train.export_every`."""
    reason = why_not_exportable(cfg.model)
    if not cfg.train.export_every:
        # Models with other blocks are not expected to be exportable.
        if set(cfg.model.pattern) == {"M"} and reason:
            log.warning("the trained model cannot be exported to transformers: %s.", reason)
        return None
    if reason:
        raise ConfigError(
            f"train.export_every={cfg.train.export_every} needs a model that transformers "
            f"supports, got {reason}; change these options, or set it to 0."
        )

    tensors.import_safetensors()  # raises ConfigError if it is missing

    def export(folder: Path, params: PyTree) -> None:
        convert.save(run_dir, folder, cfg.model, params)

    return export


def _default_run_dir(config: Path) -> Path:
    if config.is_dir():
        return config
    return config.parent if config.suffix == ".json" else Path("runs", config.stem)


def _show_sample(cfg: ExperimentConfig, result: FitResult, windows: Windows) -> None:
    """Prints how the model continues the start of the validation text."""
    prompt = windows.tokenizer.decode(
        windows.store.read(0, min(PROMPT_TOKENS, windows.store.num_tokens))
    )
    console.write(f"\n{SAMPLE_CHARACTERS} characters sampled after {prompt!r}:\n\n")
    parts = stream_text(
        LM(cfg.model),
        {"params": eval_params(cfg, result.state.params, result.state.opt_state)},
        windows.tokenizer,
        prompt,
        max_new_tokens=MAX_SAMPLE_TOKENS,
        # Without the end-of-document token, so that the sample has its full length.
        sampler=Sampler(temperature=0.8, never=(windows.tokenizer.eos_id,)),
        key=random_key(cfg.train.seed),
    )
    characters = itertools.islice(itertools.chain.from_iterable(parts), SAMPLE_CHARACTERS)
    for character in characters:
        console.write(character)
    console.write("\n")
