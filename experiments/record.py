"""The record of an experiment: what was run where, its outcome, one JSON file and one plot."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
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

    `record["outcome"]` maps each expectation, in words, to whether it holds. Returns the exit code.
    """
    measure.write(path, record)
    written = str(path)
    if plot is not None:
        plot(record, path.with_suffix(".png"))
        written += f" and {path.with_suffix('.png').name}"
    code = print_outcome(record["size"], record["outcome"])
    print(written)
    return code


def print_outcome(size: str, outcome: Mapping[str, bool | None]) -> int:
    """Prints which expectations hold; None is one that was not measured.

    Returns the exit code: 1 if one does not hold, else 0; 0 at the size smoke, whose runs are too
    short.
    """
    for expectation, holds in outcome.items():
        print({True: "yes", False: "NO ", None: "not measured"}[holds], "", expectation)
    return 0 if size == "smoke" or False not in outcome.values() else 1


def print_loss(step: int, loss: Any) -> None:
    """Prints the mean loss of each member of a grid: a `report` of `train_grid`."""
    print(f"  step {step:6d}  loss {' '.join(f'{value:.4f}' for value in loss)}", flush=True)


def pyplot() -> Any:
    """`matplotlib.pyplot`, which needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
