"""Evaluators: functions of the parameters that a run calls on a schedule."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xlstm_jax.config import ConfigError, check_range
from xlstm_jax.errors import quote
from xlstm_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A function to call during training; its metrics are recorded as `NAME_key`.

    Attributes:
        name: prefix of the metrics.
        fn: called with the parameters and the step, in every process and on the mesh of the run. It
            returns numbers, text, or lists or mappings of these. It must not keep the parameters:
            the next step donates them. An error in it is logged and does not end the run.
        every: steps between two calls; None: `train.eval_every`. It is also called at the end.
    """

    name: str
    fn: Callable[[PyTree, int], Mapping[str, Any]]
    every: int | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(
                "the name of an Evaluator must be letters, digits and any of '_.-', got "
                f"{quote(self.name)}; rename it."
            )
        check_range(f"every of the Evaluator {self.name!r}", self.every, "at least 1")


def check_evaluators(evaluators: Sequence[Evaluator], taken: Sequence[str]) -> None:
    """Raises ConfigError unless all are evaluators with distinct names that are not in `taken`."""
    taken = list(taken)
    for evaluator in evaluators:
        if not isinstance(evaluator, Evaluator):
            raise ConfigError(
                f"evaluators must be of the type xlstm_jax.train.Evaluator, got "
                f"{quote(evaluator)}; write Evaluator(name, fn)."
            )
        if evaluator.name in taken:
            raise ConfigError(
                f"evaluators must have different names, which no validation set has, got "
                f"{evaluator.name!r} twice; rename one."
            )
        taken.append(evaluator.name)
