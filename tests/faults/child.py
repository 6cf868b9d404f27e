"""One process of a run under test: python -m tests.faults.child OPTIONS (a JSON object).

It runs `xlstm-jax ARGUMENTS` as a user would, with hooks that a test asks for. It prints the phases
of the run, so that a test can kill it in one of them, and sleeps in each, so that the kill arrives
in time: {"step": 3}, {"save": 5}, {"publish": 5}, {"delete": 1}, {"evaluate": 4}, {"export": 4}.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# Seconds that a phase lasts at least.
SECONDS = {"step": 0.01, "save": 0.02, "publish": 0.05, "delete": 0.05}
SECONDS |= {"evaluate": 0.05, "export": 0.05}


def report(phase: str, step: int) -> None:
    os.write(1, (json.dumps({phase: step}) + "\n").encode())
    time.sleep(SECONDS[phase])


def before(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Calls `hook` with the arguments of a function, before each of its calls."""
    function = getattr(owner, name)

    def hooked(*args, **kwargs):
        hook(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, hooked)


def report_phases() -> None:
    from xlstm_jax import convert
    from xlstm_jax.sharding import Devices
    from xlstm_jax.train import checkpoint, loop, manifest, program

    step = [0]

    def next_step(self, leaves, batch_size=None):
        if batch_size is not None:  # a batch to train on
            report("step", step[0])
            step[0] += 1

    def start(self, *args, **kwargs):
        step[0] = self.progress.step

    before(loop.Loop, "run", start)
    before(Devices, "batch", next_step)
    before(checkpoint.Checkpointer, "save", lambda self, step, *_: report("save", step))
    before(manifest, "write", lambda folder: report("publish", int(folder.name.split(".")[0])))
    before(checkpoint.save, "delete", lambda *folders: report("delete", len(folders)))
    before(program.TrainProgram, "evaluate", lambda *_: report("evaluate", step[0]))
    before(convert, "save_hf", lambda *_, **options: report("export", step[0]))


def poison(numbers: list[int]) -> None:
    """Weights of NaN in some batches, which stay with their windows after a rewind."""
    from xlstm_jax.data.stream import Stream

    make = Stream.batch

    def batch(self, step, **hosts):
        made = make(self, step, **hosts)
        is_bad = self._start(step) // self.cfg.batch_size in numbers
        return made._replace(weights=made.weights * np.float32(np.nan)) if is_bad else made

    Stream.batch = batch


def jump_clock(seconds: float, at_step: int) -> None:
    """The wall clock jumps, as after a correction by NTP or in a restored virtual machine."""
    from xlstm_jax.sharding import Devices

    now, steps = time.time, [0]

    def count(self, leaves, batch_size=None):
        steps[0] += batch_size is not None

    before(Devices, "batch", count)
    time.time = lambda: now() + (seconds if steps[0] > at_step else 0)


def main(options: dict) -> int:
    """Runs a command with the hooks of `options`."""
    if "file_limit" in options:  # writing beyond it fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_limit"],) * 2)
    import jax

    jax.config.update("jax_num_cpu_devices", options.get("devices", 1))
    from xlstm_jax.cli import commands

    # As late as a command imports its modules: some of them configure logging.
    before(commands, "_dispatch", lambda args: install(options))
    return commands.main(options["argv"])


def install(options: dict) -> None:
    """The hooks that the options ask for."""
    SECONDS.update(options.get("seconds", {}))
    report_phases()
    if "nan_batches" in options:
        poison(options["nan_batches"])
    if "clock" in options:
        jump_clock(**options["clock"])


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
