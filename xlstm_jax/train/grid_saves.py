"""The state of a grid on disk, from which it continues after an interruption."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.train import checkpoint
from xlstm_jax.train.checkpoint.load import abstract, load_items
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.state import TrainState
from xlstm_jax.typing import Float

Losses = Float[np.ndarray, "steps M"]


class GridSaves(contextlib.AbstractContextManager):
    """Saves the newest state of a grid in `run_dir`; nothing if that is None."""

    def __init__(
        self, run_dir: Path | None, cfg: TrainConfig, members: Sequence[tuple[int, float]]
    ):
        self._run_dir, self._cfg = run_dir, cfg
        self._members = [list(member) for member in members]  # as JSON gives them back
        self._checkpointer = None if run_dir is None else checkpoint.Checkpointer(run_dir, keep=1)
        self._step, self._time = 0, time.monotonic()  # of the last save

    def restore(self, states: TrainState) -> tuple[TrainState, Losses]:
        """The saved states of all members and their losses so far, or else `states` and none."""
        losses = np.zeros((0, len(self._members)), np.float32)
        if self._run_dir is None:
            return states, losses
        self._step = checkpoint.latest_step(self._run_dir) or 0
        if not self._step:
            return states, losses
        data = load_items(self._run_dir, self._step, {"data": None})["data"]
        if data["members"] != self._members:
            raise ConfigError(
                f"{quote_path(self._run_dir)} has the grid of the seeds and learning rates "
                f"{quote(data['members'])}, which must be {quote(self._members)}; use another "
                "folder, or delete it."
            )
        like = jax.ShapeDtypeStruct((self._step, losses.shape[1]), losses.dtype)
        items = {"state": abstract({"members": states, "losses": like})}
        state = load_items(self._run_dir, self._step, items, is_verified=True)["state"]
        return state["members"], np.asarray(state["losses"])

    def save_if_due(self, states: TrainState, losses: Losses) -> None:
        """Saves at the end, and as `checkpoint_every` and `checkpoint_minutes` say."""
        if self._checkpointer is None or not self._is_due(len(losses)):
            return
        self._step, self._time = len(losses), time.monotonic()
        state = {"members": states, "losses": jax.numpy.asarray(losses)}
        self._checkpointer.save(self._step, state, {"members": self._members}, {})

    def _is_due(self, step: int) -> bool:
        cfg = self._cfg
        every, minutes = cfg.checkpoint_every, cfg.checkpoint_minutes
        return (
            step == cfg.steps
            or (every > 0 and step // every > self._step // every)
            or (minutes > 0 and time.monotonic() - self._time >= 60 * minutes)
        )

    def __exit__(self, *error: object) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
