"""Being asked to stop, without losing the work since the last checkpoint."""

import signal
import threading
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SharedStop:
    """With several processes: a SIGTERM to one of them stops all, before the same step.

    JAX's runtime receives the signal and lets the processes agree on a step that none of them has
    begun, so `at` has to be called before every step.
    """

    requested = False

    def at(self, step: int) -> bool:
        """Whether to stop before this step; the same in every process."""
        return multihost_utils.reached_preemption_sync_point(step)


class StopRequest:
    """Inside `with`, the first SIGINT or SIGTERM sets `requested`; the second acts as usual.

    Only the main thread can listen to signals; in another one it stays False.
    """

    def __init__(self):
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def at(self, step: int) -> bool:
        """The same before every step."""
        del step
        return self.requested

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *error: object) -> None:
        self._restore()


Stop = StopRequest | SharedStop
"""`requested`: to stop at once, whatever is going on; `at(step)`: to stop before this step."""
