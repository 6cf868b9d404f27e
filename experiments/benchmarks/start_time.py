"""Measures what the default model costs before its first train step: a first start and a second.

    python experiments/benchmarks/start_time.py --out RESULT.json

CPU seconds of a fresh process, on whatever cores it gets: to import the library, initialize the
parameters, trace and lower the train step, and compile it. The first start fills a new compilation
cache, the second reads it. No peer is measured: PyTorch compiles nothing.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks import measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """`child` is for internal use: measures this process and prints JSON."""

    child: bool = False


def main(args: Arguments) -> int:
    """Measures two starts and writes one result."""
    if args.child:
        print(json.dumps(start()))
        return 0
    result = measure.run_info("start_time")
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        command = [sys.executable, "-m", "experiments.benchmarks.start_time", "--child"]
        for name in ("first", "second"):
            process = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            result[name] = json.loads(process.stdout.splitlines()[-1])
            words = ", ".join(f"{phase} {cost:.2f} s" for phase, cost in result[name].items())
            print(f"{name} start: {words}")
    measure.write(args.out, result)
    return 0


def start() -> dict[str, float]:
    """CPU seconds of each phase of this process."""
    costs = {"import": time.process_time()}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        before = time.process_time()
        value = call()
        costs[name] = time.process_time() - before
        return value

    import jax

    from experiments import char_lm
    from xlstm_jax.sharding import make_devices
    from xlstm_jax.train.program import TrainProgram

    costs["import"] = time.process_time()
    cfg = char_lm.CPU
    program = timed("describe", lambda: TrainProgram(cfg, make_devices(cfg.mesh)))
    timed("initialize", lambda: jax.block_until_ready(program.init()))
    with program.devices.active():
        lowered = timed("trace", functools.partial(program.step.lower, *program.arguments))
        timed("compile", lowered.compile)
    return costs


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
