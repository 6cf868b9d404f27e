"""Uses the installed package as a new user would; `.ci/release` runs it in empty environments.

Runs the example of the README, which is in the metadata of the package, and the commands on a small
run. Prints one line; fails with the output of what failed.
"""

import importlib.metadata
import os
import pathlib
import re
import resource
import subprocess
import sys

CONFIG = """
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LMConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig


def config():
    model = LMConfig(vocab_size=257, dim=32, pattern="ms")
    data = DataConfig(source="text.txt", seq_len=32, batch_size=4)
    return ExperimentConfig(
        name="tiny", model=model, data=data, train=TrainConfig(steps=4, eval_every=2)
    )
"""
COMMANDS = (
    "--version",
    "describe xlstm_7b",
    "train tiny.py --run-dir runs/tiny",
    "evaluate runs/tiny",
    "generate runs/tiny --prompt memory --max-new-tokens 8",
)
BIN = pathlib.Path(sys.executable).parent
ENV = os.environ | {"JAX_PLATFORMS": "cpu"}


def run(*command: str | pathlib.Path) -> str:
    """Runs a command that must succeed; returns its output."""
    result = subprocess.run(command, env=ENV, text=True, capture_output=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def cpu_seconds() -> float:
    """CPU time of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(statement: str) -> float:
    """CPU time of a new interpreter that runs a statement; the shortest of five."""
    times = []
    for _ in range(5):
        start = cpu_seconds()
        run(sys.executable, "-I", "-c", statement)
        times.append(cpu_seconds() - start)
    return min(times)


def main() -> None:
    """Tries the package in the current folder."""
    metadata = importlib.metadata.metadata("xlstm-jax")
    readme = str(metadata.get_payload() or metadata["Description"])
    for block in re.findall(r"^```python\n(.*?)^```", readme, flags=re.M | re.S):
        run(sys.executable, "-I", "-c", block)
    pathlib.Path("tiny.py").write_text(CONFIG)
    pathlib.Path("text.txt").write_text("An LSTM has a memory cell and three gates.\n" * 200)
    for command in COMMANDS:
        run(BIN / "xlstm-jax", *command.split())
    extra = seconds("import jax, xlstm_jax; xlstm_jax.ops") - seconds("import jax")
    jax = importlib.metadata.version("jax")
    print(f"jax {jax}, README and {len(COMMANDS)} commands ran, ops imported in {extra:.2f} s")


if __name__ == "__main__":
    main()
