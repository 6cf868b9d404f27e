"""Processes of a run: barriers, logs and stop requests."""

import contextlib
import logging
import os
import platform
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from xlstm_jax.errors import printable

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
        log.info("the run ends with an error", exc_info=True)
        raise
    finally:
        root.removeHandler(handler)
        log.setLevel(level)
        handler.close()


@contextlib.contextmanager
def extra(what: str) -> Iterator[None]:
    """Logs an error in the body as one warning: what is not essential must not fail a saved run."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output is gone, which ends a command
        raise
    except Exception as error:
        log.warning("%s failed (%s); the run itself is not affected.", what, describe(error))


def describe(error: Exception) -> str:
    """Type and message of an error, for one line of the log."""
    return printable(f"{type(error).__name__}: {error}")[:200]


class Stop:
    """A request to stop the run."""

    def __init__(self):
        self.requested = False  # by a signal; stays False with several processes
        self._previous: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def at(self, step: int) -> bool:
        """Whether to stop before this step; must be called before every step.

        With several processes, JAX's runtime handles a SIGTERM to any of them and selects a step
        that no process has started, so that all of them stop at the same step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def listen(self) -> None:
        """From now on, the first SIGINT or SIGTERM sets `requested`.

        The second one has its previous effect. Only the main thread can handle signals; in other
        threads `requested` stays False.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and jax.process_count() == 1:
            self._wakeup = signal.set_wakeup_fd(-1)  # no `exit_on_signal` any more
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()  # so that a second signal ends a run that does not stop

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def close(self) -> None:
        """Restores the previous effect of signals."""
        self._restore()
        if self._wakeup != -1:
            self._wakeup = signal.set_wakeup_fd(self._wakeup)


@contextlib.contextmanager
def exit_on_signal() -> Iterator[None]:
    """Within the context, SIGINT and SIGTERM end the process with exit code 130 or 143.

    They do so at once and with one line, also while the main thread compiles: Python handles
    signals only when compilation returns, so a thread waits for them as well. Nothing is lost that
    `Stop.listen` would not save. Several processes leave signals to JAX's runtime.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in previous:
                _exit(number[0])
        os.close(reader)

    previous = {n: signal.signal(n, _exit) for n in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread


def _exit(number: int, frame: FrameType | None = None) -> None:
    # Not an exception: it would wait for a save in progress, which may be slow.
    line = (
        f"xlstm-jax: interrupted by {signal.Signals(number).name}; the same command continues from "
        "the last complete checkpoint.\n"
    )
    show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it
    os.write(2, (show_cursor + line).encode())
    os._exit(128 + number)
