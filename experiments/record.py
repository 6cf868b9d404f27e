"""The record of an experiment: what was run where, its outcome, one JSON file and one plot."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

from experiments.benchmarks import measure
from xlstm_jax.errors import ConfigError, quote

Size = Literal["smoke", "cpu", "paper"]
RESULTS = pathlib.Path(__file__).parent / "results"
run = measure.run


def check_size(size: str, sizes: Iterable[str]) -> None:
    """Raises ConfigError unless `size` is one of `sizes`."""
    sizes = tuple(sizes)
    if size not in sizes:
        raise ConfigError(f"size={quote(size)} is unknown; use one of: {', '.join(sizes)}.")


def check_names(names: Iterable[str], models: Iterable[str]) -> None:
    """Raises ConfigError unless `names` is not empty and all are of models."""
    for name in tuple(names) or ("",):
        if name not in models:
            raise ConfigError(f"model={quote(name)} is unknown; use one of: {', '.join(models)}.")


def start(name: str, size: str) -> dict[str, Any]:
    """The head of a record: experiment, size, date, command, machine, versions."""
    info = measure.run_info(name)
    del info["benchmark"]
    command = f"python experiments/{name}.py --size {size}"
    return {"experiment": name, "size": size, "command": command, **info}


def save(
    record: dict[str, Any],
    path: pathlib.Path,
    plot: Callable[[dict[str, Any], pathlib.Path], None] | None = None,
) -> int:
    """Writes the record and, next to it, its plot, and prints which expectations hold.

    `record["outcome"]` maps each expectation, in words, to whether it holds.

    Returns the exit code: 0 if all hold, else 1; 0 at the size smoke, whose runs are too short.
    """
    measure.write(path, record)
    written = str(path)
    if plot is not None:
        plot(record, path.with_suffix(".png"))
        written += f" and {path.with_suffix('.png').name}"
    for expectation, holds in record["outcome"].items():
        print(f"{'yes' if holds else 'NO '}  {expectation}")
    print(written)
    return 0 if record["size"] == "smoke" or all(record["outcome"].values()) else 1


def print_loss(step: int, loss: Any) -> None:
    """Prints the mean loss of each member of a grid: a `report` of `train_grid`."""
    print(f"  step {step:6d}  loss {' '.join(f'{value:.4f}' for value in loss)}", flush=True)


def pyplot() -> Any:
    """`matplotlib.pyplot`, which needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
