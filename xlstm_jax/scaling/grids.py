"""Runs that differ only in seed and learning rate, trained together as one program."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.config import ConfigError, fingerprint, load_config, read_json
from xlstm_jax.data import eval_batches, load
from xlstm_jax.errors import UnsupportedError
from xlstm_jax.modules import LM
from xlstm_jax.scaling.launch import Execute, Local
from xlstm_jax.scaling.runs import load_run, record_failure, record_result
from xlstm_jax.scaling.status import SPEC, RunStatus, status
from xlstm_jax.train import checkpoint, lock, rundir
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.train.grid import Grid, batches_of, evaluate_grid, train_members
from xlstm_jax.train.guard import DivergedError

FOLDER = "grids"
"""Folder of a sweep with the states of unfinished grids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grids(Local):
    """Trains runs that differ only in seed and learning rate as one program, on one device.

    For small models, which leave most of a device idle; the runs of a grid are in memory at the
    same time. The validation loss is that of `Local`, but a large gradient is only clipped, where
    `Local` may skip the step, and a run has no checkpoint of its own. Runs that cannot be members
    of a grid (those that have started alone, or whose config has parts that grids lack) are
    trained one after the other.
    """

    max_members: int = 64  # runs of a grid

    def launch(self, folders: Sequence[Path], execute: Execute) -> None:
        """Trains the runs in these folders."""
        if jax.process_count() > 1:
            raise UnsupportedError(
                f"a grid of runs needs one process, got {jax.process_count()}; use the launcher "
                "Local (--launch local)."
            )
        groups: dict[str, list[Path]] = {}
        for folder in folders:
            groups.setdefault(_group_of(folder), []).append(folder)
        for group in groups.values():
            for first in range(0, len(group), self.max_members):
                members = group[first : first + self.max_members]
                if len(members) == 1:
                    super().launch(members, execute)
                else:
                    self.train(members, train_together)


def _group_of(folder: Path) -> str:
    """Equal for runs that may be members of one grid."""
    cfg = load_config(folder / rundir.CONFIG, ExperimentConfig)
    train = cfg.train
    if (
        checkpoint.latest_step(folder) is not None  # it has started alone
        or cfg.init_from is not None
        or cfg.lora.rank
        or train.ema_decay
        or train.carry_state
        or train.batch_ramp
        or train.optimizer.startswith("schedule_free")
    ):
        return folder.name
    # Seeds and rates that are valid in any config.
    same = dataclasses.replace(train, seed=0, lr=TrainConfig.lr)
    return fingerprint(dataclasses.replace(cfg, name="", train=same))


def train_together(folders: Sequence[Path]) -> list[RunStatus]:
    """Trains the runs in these prepared folders, of one group, or continues; see `execute`.

    Those that another process trains are left alone.
    """
    specs = {folder: read_json(folder / SPEC) for folder in folders}
    with contextlib.ExitStack() as stack:
        mine = []
        for folder in folders:
            with contextlib.suppress(ConfigError):  # it is in use
                stack.enter_context(lock.hold(folder))
                mine.append(folder)
        state = folders[0].parent / FOLDER / _name_of(mine)
        try:
            _train(mine, specs, state)
        except Exception as error:
            for folder in mine:
                record_failure(folder, error)
        else:
            shutil.rmtree(state, ignore_errors=True)
    return [status(folder, spec["name"]) for folder, spec in specs.items()]


def _name_of(folders: Sequence[Path]) -> str:
    names = " ".join(folder.name for folder in folders)
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def _train(folders: Sequence[Path], specs: dict[Path, dict[str, Any]], state: Path) -> None:
    """Trains and evaluates the grid of these runs, and writes their records."""
    if not folders:
        return
    start = time.monotonic()
    configs = [load_run(folder) for folder in folders]
    members = [(cfg.train.seed, cfg.train.lr) for cfg in configs]
    cfg, model = configs[0], LM(configs[0].model)
    batches = batches_of(load(cfg.data, "train"), cfg.data)
    grid = train_members(model, cfg.train, batches, members, run_dir=state)
    seconds = (time.monotonic() - start) / len(folders)
    valid = eval_batches(load(cfg.data, "valid"), cfg.data, cfg.train.eval_batches)
    sums = evaluate_grid(model, grid.params, valid, cfg.train)
    for i, folder in enumerate(folders):
        if grid.diverged[i]:
            record_failure(folder, DivergedError("the last updates were not finite; lower lr."))
            continue
        _write_metrics(folder, grid, i, cfg.train, seconds)
        record_result(folder, specs[folder], float(sums.ce_sum[i] / sums.weight_sum[i]))


def _write_metrics(folder: Path, grid: Grid, index: int, cfg: TrainConfig, seconds: float) -> None:
    """The training losses of one member, with its share of the time since this process started."""
    lines = []
    for first in range(0, cfg.steps, cfg.log_every):
        losses = grid.losses[first : first + cfg.log_every, index]
        record = {"step": first + len(losses), "loss": float(losses.mean())}
        lines.append(json.dumps(record | {"step_time": seconds / cfg.steps}))
    rundir.write(folder / rundir.METRICS, "".join(line + "\n" for line in lines).encode())
