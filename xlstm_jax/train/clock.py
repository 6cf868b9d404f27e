"""Timing of train steps, excluding compilation, evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal


class Clock:
    """Times the steps between two laps; stopped until the first `start`."""

    def __init__(self):
        self.start()
        self.running = False

    def start(self) -> None:
        """Starts a lap. A run calls this first after its program has been compiled."""
        self.running = True
        self._begin = time.perf_counter()
        self._seconds = {"pause": 0.0, "wait": 0.0}
        self._steps = 0

    def step(self) -> None:
        """Counts a step that has been dispatched to the device."""
        self._steps += 1

    @contextlib.contextmanager
    def measure(self, kind: Literal["pause", "wait"]) -> Iterator[None]:
        """Times its body as a pause, which is not training, or as a wait for data, which is."""
        begin = time.perf_counter()
        yield  # without `finally`: after an error the run ends and no lap follows
        self._seconds[kind] += time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """Seconds per step since the last lap, and the seconds of these spent waiting for data."""
        if not self.running or self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._begin - self._seconds["pause"]
        lap = {"step_time": seconds / self._steps, "data_wait": self._seconds["wait"] / self._steps}
        self.start()  # the next lap
        return lap
