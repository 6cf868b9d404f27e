"""Times train steps of PyTorch packages in a separate process."""

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

from xlstm_jax.config import ConfigError

SCRIPT = pathlib.Path(__file__).parent / "peer_torch.py"


class Peer:
    """A running script such as `peer_torch.py`; `description` has its parameters and versions."""

    def __init__(self, python: str, process: subprocess.Popen[str]):
        self._python, self._process = python, process
        self.description: dict[str, Any] = self._read()

    def seconds(self, steps: int) -> list[float]:
        """Runs `steps` train steps; returns the time of each."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(
                f"peer-python must name an interpreter with torch and the package to compare with, "
                f"got {self._python!r}, which exited; its error is above."
            )
        return json.loads(line)


@contextlib.contextmanager
def start(
    python: str | None, *arguments: str, script: pathlib.Path = SCRIPT
) -> Iterator[Peer | None]:
    """Starts the peer with its arguments, those of the script; yields None if `python` is None.

    Raises:
        ConfigError: the interpreter does not exist or lacks a package.
    """
    if python is None:
        yield None
        return
    # -P: the packages of the peer must not import scripts beside this one, such as kernels.py.
    try:
        process = subprocess.Popen(
            [python, "-P", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise ConfigError(
            f"peer-python must name an interpreter, got {python!r} ({error.strerror}); "
            "omit it to measure only xlstm-jax."
        ) from error
    with process:
        try:
            yield Peer(python, process)
        finally:
            process.kill()
