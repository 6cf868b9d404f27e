"""Processes of a run: barriers, logs and stop requests."""

import contextlib
import dataclasses
import logging
import platform
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger("xlstm_jax")
"""Logs the progress of each process; with a single process the metrics suffice."""


def sync_processes(name: str) -> None:
    """A barrier: returns when all processes have called it; a single one returns at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def process_log(run_dir: Path) -> Iterator[None]:
    """Within the context, `log` and warnings of several processes go to RUN/process_I.log."""
    if jax.process_count() == 1:
        yield
        return
    path = run_dir / f"process_{jax.process_index()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)  # other loggers inherit the root's level, warnings
    try:
        devices = ", ".join(map(str, jax.local_devices()))
        count = jax.process_count()
        log.info("process %d of %d on %s: %s", jax.process_index(), count, platform.node(), devices)
        yield
    except BaseException:  # KeyboardInterrupt too: the log must show why a process ended
        log.exception("the run ends with an error")
        raise
    finally:
        root.removeHandler(handler)
        log.setLevel(level)
        handler.close()


@dataclasses.dataclass
class Stop:
    """A request to stop the run."""

    requested: bool = False  # by a signal; stays False with several processes

    def at(self, step: int) -> bool:
        """Whether to stop before this step; must be called before every step.

        With several processes, JAX's runtime handles a SIGTERM to any of them and selects a step
        that no process has started, so that all of them stop at the same step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested


@contextlib.contextmanager
def stop_request() -> Iterator[Stop]:
    """Within the context, the first SIGINT or SIGTERM sets `requested`.

    The second one has its previous effect. Only the main thread can handle signals; in other
    threads `requested` stays False.
    """
    stop = Stop()
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()  # so that a second signal ends a run that does not stop

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and jax.process_count() == 1:
        previous |= {n: signal.signal(n, request) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
