"""How fast a run goes, without counting compilation, evaluation and checkpoints."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Measures the steps between two laps; stopped until the first `start`."""

    def __init__(self):
        self._begin: float | None = None
        self._pause = self._wait = 0.0
        self._steps = 0

    @property
    def running(self) -> bool:
        """Whether it was started."""
        return self._begin is not None

    def start(self) -> None:
        """From now on steps count; the first call of a run comes when its program is compiled."""
        self._begin = time.perf_counter()
        self._pause = self._wait = 0.0
        self._steps = 0

    def step(self) -> None:
        """One more step has been handed to the device."""
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not part of training."""
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """Seconds per step since the last lap, and the part of them that was spent on waiting."""
        if self._begin is None or self._steps == 0:
            return {}
        seconds = time.perf_counter() - self._begin - self._pause
        lap = {"step_time": seconds / self._steps, "data_wait": self._wait / self._steps}
        self.start()
        return lap
