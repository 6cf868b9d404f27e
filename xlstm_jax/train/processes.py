"""Processes of a run: waiting for each other, their logs, and being asked to stop."""

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
"""What a process of several has done; alone, the metrics say it."""


def wait_for_all(where: str) -> None:
    """Returns once every process of the program is here; alone, at once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def process_log(run_dir: Path) -> Iterator[None]:
    """Within, `log` and all warnings go to RUN/process_I.log, where there are several processes."""
    if jax.process_count() == 1:
        yield
        return
    path = run_dir / f"process_{jax.process_index()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, level = logging.getLogger(), log.level
    root.addHandler(handler)
    log.setLevel(logging.INFO)  # of others the root passes warnings on
    try:
        devices = ", ".join(map(str, jax.local_devices()))
        count = jax.process_count()
        log.info("process %d of %d on %s: %s", jax.process_index(), count, platform.node(), devices)
        yield
    except BaseException:
        log.exception("the run ends with an error")
        raise
    finally:
        root.removeHandler(handler)
        log.setLevel(level)
        handler.close()


@dataclasses.dataclass
class Stop:
    """Whether this run was asked to stop."""

    requested: bool = False  # at once, whatever is going on; stays False with several processes

    def at(self, step: int) -> bool:
        """Whether to stop before this step; to be called before every step.

        With several processes, JAX's runtime receives a SIGTERM to one of them and lets them agree
        on a step that none of them has begun.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested


@contextlib.contextmanager
def stop_request() -> Iterator[Stop]:
    """Within, the first SIGINT or SIGTERM sets `requested`; the second acts as usual.

    Only the main thread can listen to signals; in another one it stays False.
    """
    stop = Stop()
    previous: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()

    is_main = threading.current_thread() is threading.main_thread()
    if is_main and jax.process_count() == 1:
        previous |= {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
