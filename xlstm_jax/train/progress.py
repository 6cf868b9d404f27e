"""The host state of a run: its step, and the metrics that are not written yet."""

import dataclasses
from typing import Any

import jax
import numpy as np

from xlstm_jax.errors import quote
from xlstm_jax.train import metrics
from xlstm_jax.train.checkpoint import CheckpointError

Skips = list[tuple[int, int]]
"""(step, end): from `step` on, the data of the steps from `step` to `end` are left out."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Host state of a run, saved with every checkpoint, so that resuming is exact."""

    step: int = 0  # batches consumed; determines the next batch
    tokens_seen: int = 0  # until the last record
    # Since the last record.
    totals: metrics.Totals = dataclasses.field(default_factory=metrics.empty)
    evaluation: dict[str, Any] | None = None  # the last result, with its step
    evaluators: dict[str, int] = dataclasses.field(default_factory=dict)  # name -> last step
    checkpoints: int = 0  # number saved so far
    skips: Skips = dataclasses.field(default_factory=list)  # of data, one per rewind

    def to_json(self) -> dict[str, Any]:
        """The JSON values of a checkpoint; float32 round-trips through JSON exactly."""
        totals = jax.tree.map(float, jax.device_get(self.totals))
        return vars(self) | {"totals": totals._asdict()}

    @classmethod
    def from_json(cls, values: Any) -> tuple["Progress", dict[str, Any]]:
        """The progress and the description of the data saved with it.

        Raises:
            CheckpointError: the values are not of a progress.
        """
        try:
            data, totals = values["data"], metrics.Totals(**values["totals"])
            # JSON has no float32, so the dtypes come from fresh totals.
            totals: Any = jax.tree.map(lambda x, y: np.asarray(y, x.dtype), metrics.empty(), totals)
            values = {name: value for name, value in values.items() if name != "data"}
            skips = [(int(step), int(end)) for step, end in values.get("skips", ())]
            return cls(**values | {"totals": totals, "skips": skips}), dict(data)
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the item `data` of the checkpoint must be the progress of a run, but it is "
                f"damaged ({quote(values)}); delete that checkpoint to resume from the one before."
            ) from error
