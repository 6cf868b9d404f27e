"""Where the time of a run goes: seconds per step, and the share of all time spent in steps."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

Part = Literal["restore", "compile", "wait", "save", "evaluate"]
PARTS: tuple[Part, ...] = ("restore", "compile", "wait", "save", "evaluate")
"""What a run does besides steps. Steps that wait for data include the wait, but it is not goodput.

restore: from the call of `fit` to its first step, such as loading data and a checkpoint.
compile: programs, each with its first execution.
wait: for the next batch.
save: checkpoints, with their pictures, exports and traces.
evaluate: validation data and evaluators.
"""


class Clock:
    """Times the steps between two laps, and the parts of the run; starts when it is made."""

    def __init__(self):
        self.parts: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._created = time.perf_counter()
        self.start()
        self.running = False

    def ready(self) -> None:
        """Ends the part "restore", which begins when the clock is made."""
        self.parts["restore"] += time.perf_counter() - self._created

    def start(self) -> None:
        """Starts a lap. A run calls this first after its program has been compiled."""
        self.running = True
        self._begin = time.perf_counter()
        self._paused = self._waited = 0.0
        self._steps = 0

    def step(self) -> None:
        """Counts a step that has been dispatched to the device."""
        self._steps += 1

    @contextlib.contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Times its body, which is excluded from `step_time` unless it waits for data."""
        begin = time.perf_counter()
        yield  # without `finally`: after an error the run ends and no lap follows
        seconds = time.perf_counter() - begin
        self.parts[part] += seconds
        if part == "wait":
            self._waited += seconds
        else:
            self._paused += seconds

    def lap(self) -> dict[str, float]:
        """Seconds per step since the last lap, and the seconds of these spent waiting for data."""
        if not self.running or self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._begin - self._paused
        lap = {"step_time": seconds / self._steps, "data_wait": self._waited / self._steps}
        self.start()  # the next lap
        return lap

    def goodput(self) -> float:
        """The share of the time since the clock was made that was spent in none of `parts`."""
        return 1 - sum(self.parts.values()) / self.total()

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._created
