"""How far a run is, apart from its train state."""

import dataclasses
from typing import Any

from xlstm_jax.train import metrics


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Saved beside the state, so that an interruption between two records leaves no trace."""

    step: int = 0  # batches seen; this is the whole data position
    tokens_seen: int = 0  # up to the last record
    totals: metrics.Totals = dataclasses.field(default_factory=metrics.empty)  # since then
    evaluation: dict[str, Any] | None = None  # the last one, with its step

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return vars(self) | {"totals": metrics.to_json(self.totals)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """The inverse of `to_json`."""
        totals: Any = metrics.from_json(values["totals"])
        return cls(**values | {"totals": totals})
