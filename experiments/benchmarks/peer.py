"""The official package in a process of its own, asked for steps whenever it is its turn."""

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

from xlstm_jax.config import ConfigError

SCRIPT = pathlib.Path(__file__).parent / "peer_torch.py"


class Peer:
    """A running `peer_torch.py`."""

    def __init__(self, python: str, process: subprocess.Popen[str]):
        self._python, self._process = python, process
        self.description: dict[str, Any] = self._answer()

    def seconds(self, steps: int) -> list[float]:
        """How long each of the next steps takes it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(
                f"peer-python must name an interpreter with torch, xlstm and mlstm_kernels, got "
                f"{self._python!r}, which stopped; its complaint is above."
            )
        return json.loads(line)


@contextlib.contextmanager
def start(python: str | None, case: str) -> Iterator[Peer | None]:
    """The peer with its model of that name ready; None without an interpreter for it.

    Raises:
        ConfigError: the interpreter is not there, or lacks a package.
    """
    if python is None:
        yield None
        return
    try:
        process = subprocess.Popen(
            [python, str(SCRIPT), case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise ConfigError(
            f"peer-python must name an interpreter, got {python!r} ({error.strerror}); "
            "leave it out to measure ours alone."
        ) from error
    with process:
        try:
            yield Peer(python, process)
        finally:
            process.kill()
