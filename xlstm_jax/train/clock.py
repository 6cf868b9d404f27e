"""How fast a run goes, without counting compilation, evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal


class Clock:
    """Measures the steps between two laps; stopped until the first `start`."""

    def __init__(self):
        self.start()
        self.running = False

    def start(self) -> None:
        """From now on steps count; the first call of a run comes when its program is compiled."""
        self.running = True
        self._begin = time.perf_counter()
        self._seconds = {"pause": 0.0, "wait": 0.0}
        self._steps = 0

    def step(self) -> None:
        """One more step has been handed to the device."""
        self._steps += 1

    @contextlib.contextmanager
    def measure(self, kind: Literal["pause", "wait"]) -> Iterator[None]:
        """What happens inside is not part of training (pause), or is waiting for data."""
        begin = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """Seconds per step since the last lap, and the part of them that was spent on waiting."""
        if not self.running or self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._begin - self._seconds["pause"]
        lap = {"step_time": seconds / self._steps, "data_wait": self._seconds["wait"] / self._steps}
        self.start()
        return lap
