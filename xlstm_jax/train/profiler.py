"""`train.profile`: a trace of some steps for the profile viewers of XLA."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.train.processes import extra


class Profiler:
    """Traces the steps of a range, counted as `Progress.step`, to a folder; None: no steps."""

    def __init__(self, steps: range | None, folder: Path):
        self._steps, self._folder = steps or range(0), folder
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """A context for the dispatch of the step after `step` steps; starts the trace."""
        if step not in self._steps:
            yield
            return
        if not self._is_tracing:
            with extra("the profiler trace"):  # fails if the caller has started one
                jax.profiler.start_trace(str(self._folder))
                self._is_tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def is_due(self, step: int) -> bool:
        """Whether the trace ends after `step` steps."""
        return self._is_tracing and step not in self._steps

    def stop(self, result: Any = None) -> None:
        """Ends and writes a trace in progress after `result` has been computed."""
        if self._is_tracing:
            self._is_tracing = False
            jax.block_until_ready(result)
            with extra("the profiler trace"):
                jax.profiler.stop_trace()
