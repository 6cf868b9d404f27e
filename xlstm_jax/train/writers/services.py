"""The writers of `train.writers`: TensorBoard, Weights & Biases, Trackio; packages of their own."""

import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import numpy as np

from xlstm_jax.errors import ConfigError, import_optional
from xlstm_jax.train.config import WriterName
from xlstm_jax.train.writers.base import Writer, flatten

PACKAGES: dict[WriterName, str] = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
}
PROJECT = "xlstm-jax"
TENSORBOARD = "tensorboard"
"""Folder of the run directory."""


def check_services(names: Sequence[WriterName]) -> None:
    """Raises ConfigError if a service lacks its package or, for Weights & Biases, a key."""
    for name in names:
        _import(name)
        if name == "wandb" and not _has_wandb_key():
            raise ConfigError(
                "train.writers has 'wandb', which needs an API key, but WANDB_API_KEY is not set "
                "and .netrc has none; run `wandb login`, or set WANDB_MODE=offline."
            )


def open_service(
    name: WriterName, run_dir: Path, *, run_name: str, run_id: str, step: int, config: Any
) -> Writer:
    """Opens a service for a run that has done `step` steps.

    A resumed run continues the same run of the service, which `run_id` identifies.
    """
    module = _import(name)
    if name == "tensorboard":
        return TensorBoardWriter(module, run_dir / TENSORBOARD, step)
    options: dict[str, Any] = dict(project=PROJECT, config=config, resume="allow")
    if name == "wandb":
        return TrackerWriter(module.init(**options, name=run_name, id=run_id))
    # Trackio identifies a run by its name.
    return TrackerWriter(module.init(**options, name=f"{run_name}-{run_id}"))


class TensorBoardWriter:
    """Writes scalars, histograms over the values of lists, and text to event files."""

    def __init__(self, module: ModuleType, folder: Path, step: int):
        # Events of a killed run after its last checkpoint are written again.
        self._writer = module.SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a record."""
        for name, value in flatten(metrics):
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
                continue
            values = _finite_values(value)
            if len(values):
                self._writer.add_scalar(name, values.mean(), step)
            if len(values) and np.ndim(value):
                self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class TrackerWriter:
    """Writes scalars, and the means of lists, to a run of `wandb` or `trackio`."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a record; text is left out."""
        values = {n: _finite_values(v) for n, v in flatten(metrics) if not isinstance(v, str)}
        self._run.log({n: float(v.mean()) for n, v in values.items() if len(v)}, step=step)

    def close(self) -> None:
        """Uploads what is left and ends the run of the service."""
        self._run.finish()


def _finite_values(value: Any) -> np.ndarray:
    values = np.ravel(np.asarray(value, np.float64))  # null becomes NaN
    return values[np.isfinite(values)]


def _import(name: WriterName) -> ModuleType:
    purpose = f"the writer {name!r} of train.writers"
    return import_optional(PACKAGES[name], purpose, install=f"xlstm-jax[{name}]")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    paths = [Path(file).expanduser() for file in files if file]
    return bool(os.environ.get("WANDB_API_KEY")) or any(_has_login(p, host) for p in paths)


def _has_login(path: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
