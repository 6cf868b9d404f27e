"""What a run consists of besides its loop: data, directory, writers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.data import loader
from xlstm_jax.data.batch import Examples
from xlstm_jax.data.mixture import check_tokenizers
from xlstm_jax.data.stream import Stream
from xlstm_jax.data.windows import Windows
from xlstm_jax.errors import quote
from xlstm_jax.train import initial, lora, rundir
from xlstm_jax.train.batches import GivenBatches, TrainBatches
from xlstm_jax.train.checkpoint import Checkpointer
from xlstm_jax.train.config import ExperimentConfig, check_vocabulary
from xlstm_jax.train.outputs import Exporter, Outputs
from xlstm_jax.train.processes import extra, log, sync_processes
from xlstm_jax.train.profiler import Profiler
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.trainable import ADAPTERS, num_bytes, partition
from xlstm_jax.train.writers import (
    CallbackWriter,
    ConsoleWriter,
    JsonlWriter,
    OptionalWriter,
    Writer,
    check_services,
    open_service,
)


def check_outputs(
    cfg: ExperimentConfig, writers: Sequence[Writer], exporter: Exporter | None
) -> None:
    """Raises ConfigError if a writer or an export cannot work."""
    check_services(cfg.train.writers)
    for writer in writers:
        if not isinstance(writer, Writer):
            raise ConfigError(
                "writers must have the methods write(step, metrics) and close(), got "
                f"{quote(writer)}; add them."
            )
    if cfg.train.export_every and exporter is None:
        raise ConfigError(
            f"train.export_every={cfg.train.export_every} needs the argument exporter of fit, got "
            "None; pass it, train with the command `xlstm-jax train`, or set it to 0."
        )


def train_batches(cfg: ExperimentConfig, data: Any) -> TrainBatches:
    """The training batches: those of the caller, or those that the config describes."""
    if data is not None:
        return GivenBatches(data, cfg)
    examples = loader.load(cfg.data, "train")
    check_vocabulary(cfg, examples)
    if cfg.train.carry_state and not isinstance(examples, Windows):
        raise ConfigError(
            f"train.carry_state must be False with data.source={quote(cfg.data.source)}, whose "
            "samples are independent; use text."
        )
    return Stream(examples, cfg.data, cfg.batch_sizes)


def validation_sets(cfg: ExperimentConfig) -> dict[str, Examples]:
    """The validation sets, by the prefix of their metrics."""
    if not cfg.train.eval_every:
        return {}
    validation = {"valid": loader.load(cfg.data, "valid"), **loader.load_eval_sets(cfg.data)}
    for examples in validation.values():
        check_vocabulary(cfg, examples)
    check_tokenizers("data.eval_sets", validation)
    return validation


def facts_of_run(
    cfg: ExperimentConfig,
    state: TrainState,
    train: TrainBatches,
    validation: Mapping[str, Examples],
) -> dict[str, Any]:
    """What run.json records of a run: sizes in bytes over all devices, and the data."""
    trained, _ = partition(state.params, cfg.train.freeze)
    facts = {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "num_trained_params": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "params_bytes": num_bytes(state.params),
        "trained_params_bytes": num_bytes(trained),
        "optimizer_bytes": num_bytes(state.opt_state),
    }
    log.info("state: %s", ", ".join(f"{name} {size:,}" for name, size in facts.items()))
    if cfg.lora.rank:
        base = {name: tree for name, tree in state.params.items() if name != ADAPTERS}
        targets = lora.targets(base, cfg.lora)
        log.info(
            "adapters: %s; without: %s", ", ".join(targets.matrices), ", ".join(targets.skipped)
        )
        facts |= {"lora": targets._asdict()}
    sets = {"train": train.description}
    return facts | {"data": sets | {name: x.description for name, x in validation.items()}}


def show_trained(facts: Mapping[str, Any]) -> None:
    """Prints how much of the model is trained, unless it is all of it."""
    if facts["num_trained_params"] < facts["num_params"]:
        text = (
            f"trains {facts['num_trained_params']:,} of {facts['num_params']:,} parameters; "
            f"optimizer state {facts['optimizer_bytes']:,} bytes, parameters "
            f"{facts['params_bytes']:,} bytes"
        )
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def prepare_directory(
    cfg: ExperimentConfig,
    run_dir: Path,
    facts: dict[str, Any],
    examples: Sequence[Any],
    *,
    step: int,
    starts: bool,
    fresh: bool,
) -> None:
    """The first process prepares the directory while the others wait.

    They write only a log and their shards of checkpoints. `starts`: nothing was resumed.
    """
    sync_processes("before the run directory is prepared")
    if jax.process_index() == 0:
        if fresh:
            rundir.discard(run_dir)
        rundir.prepare(run_dir, cfg, facts, step)
        if starts and cfg.init_from is not None:
            initial.copy_notes(cfg, run_dir)
        tokenizers = (getattr(one, "tokenizer", None) for one in examples)
        if (tokenizer := next(filter(None, tokenizers), None)) is not None:
            tokenizer.save(run_dir / rundir.TOKENIZER)
    sync_processes("the run directory is prepared")


def open_writers(
    cfg: ExperimentConfig,
    run_dir: Path,
    writers: Sequence[Writer],
    on_metrics: Callable[[int, dict[str, Any]], None] | None,
    *,
    step: int,
    run_id: str,
    console: bool,
) -> list[Writer]:
    """All writers of this process; only the first one has those of files and services."""
    opened: list[Writer] = []
    if jax.process_index() == 0:
        opened.append(JsonlWriter(run_dir / rundir.METRICS))
        opened += [ConsoleWriter(cfg.train.steps, step)] if console else []
        opened += map(OptionalWriter, [*_services(cfg, run_dir, step, run_id), *writers])
    if on_metrics is not None:
        opened.append(CallbackWriter(on_metrics))
    return opened


def open_outputs(
    cfg: ExperimentConfig, run_dir: Path, writers: Sequence[Writer], exporter: Exporter | None
) -> Outputs:
    """The destinations of everything that the run writes."""
    traced = cfg.train.profile_steps if jax.process_index() == 0 else None
    return Outputs(
        run_dir=run_dir,
        writers=writers,
        checkpoints=Checkpointer(run_dir, cfg.train.keep),
        profiler=Profiler(traced, run_dir / rundir.PROFILE),
        exporter=exporter if cfg.train.export_every else None,
    )


def _services(cfg: ExperimentConfig, run_dir: Path, step: int, run_id: str) -> Iterator[Writer]:
    """The writers of `train.writers`; one that cannot be opened is logged and left out."""
    for name in cfg.train.writers:
        with extra(f"opening the writer {name!r}"):
            yield open_service(
                name,
                run_dir,
                run_name=cfg.name,
                run_id=run_id,
                step=step,
                config=to_dict(cfg),
            )
