"""What a run evaluates, and when: validation sets and evaluators."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xlstm_jax.data.batch import Examples
from xlstm_jax.train.evaluators import Evaluator
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.processes import Stop, describe, log
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.progress import Progress
from xlstm_jax.typing import PyTree


class Evaluation:
    """The validation sets and the evaluators of a run, each evaluated at most once per step.

    `validation` has the sets by the prefix of their metrics. `progress` is updated in place.
    """

    def __init__(
        self,
        program: TrainProgram,
        progress: Progress,
        validation: Mapping[str, Examples],
        evaluators: Sequence[Evaluator],
        stop: Stop,
    ):
        self._program, self._progress, self._stop = program, progress, stop
        self._validation, self._evaluators = validation, evaluators

    def is_due(self, *, is_last: bool) -> bool:
        """Whether anything is to be evaluated at this step; all of it at the last one."""
        return self._is_validation_due(is_last=is_last) or bool(self._due(is_last=is_last))

    def run(self, params: PyTree, *, is_last: bool) -> Iterator[dict[str, Any]]:
        """Evaluates what is due and yields the records.

        A stop request defers the rest until the run is resumed.
        """
        progress = self._progress
        if self._is_validation_due(is_last=is_last):
            record: dict[str, Any] = {}
            for name, examples in self._validation.items():
                result = self._program.evaluate(
                    params, examples, lambda: self._stop.requested, name
                )
                if result is None:  # stopped
                    return
                record |= result
            progress.evaluation = {"step": progress.step} | record
            yield record
        for evaluator in self._due(is_last=is_last):
            if self._stop.requested:
                return
            progress.evaluators[evaluator.name] = progress.step
            if record := _call(evaluator, params, progress.step):
                yield record

    def _is_validation_due(self, *, is_last: bool) -> bool:
        done = (self._progress.evaluation or {}).get("step")
        return bool(self._validation) and self._is_time(None, done, is_last=is_last)

    def _due(self, *, is_last: bool) -> list[Evaluator]:
        done = self._progress.evaluators
        return [
            evaluator
            for evaluator in self._evaluators
            if self._is_time(evaluator.every, done.get(evaluator.name), is_last=is_last)
        ]

    def _is_time(self, every: int | None, done: int | None, *, is_last: bool) -> bool:
        step, every = self._progress.step, every or self._program.cfg.train.eval_every
        return done != step and bool(every) and (is_last or (step > 0 and step % every == 0))


def _call(evaluator: Evaluator, params: PyTree, step: int) -> dict[str, Any]:
    """The record of an evaluator; {} if it failed, which is logged."""
    try:
        metrics = evaluator.fn(params, step)
        return {f"{evaluator.name}_{key}": _to_json(value) for key, value in metrics.items()}
    except (BrokenPipeError, DivergedError):
        raise
    except Exception as error:
        log.warning(
            "the evaluator %r failed at step %d (%s); the run continues.",
            evaluator.name, step, describe(error), exc_info=True,
        )  # fmt: skip
        return {}


def _to_json(value: Any) -> Any:
    """A number, text or array, or mappings of these, as JSON values."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return array.tolist()
    # Also bfloat16; raises an error for what is not a number.
    return array.astype(np.float64).tolist()
