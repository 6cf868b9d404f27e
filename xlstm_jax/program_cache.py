"""Compiled programs on disk, shared by all runs of a user."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

CACHE_DIR = "XLSTM_CACHE_DIR"
"""Environment variable: the folder of this library's caches; `~/.cache/xlstm-jax` by default."""


def cache_dir() -> Path | None:
    """The folder of this library's caches, which need not exist; None without a home directory."""
    try:
        return Path(os.environ.get(CACHE_DIR) or "~/.cache/xlstm-jax").expanduser()
    except RuntimeError:  # as in a container whose user has none
        return None


@contextlib.contextmanager
def compiled_programs() -> Iterator[None]:
    """Within the context, JAX keeps compiled programs in `cache_dir()`, unless it has a cache.

    Another run of the same program, by any command and in any folder, then compiles nothing. JAX's
    key is the program, its options and the versions: seeds, paths and names of runs are not in it.
    The setting is global to the process and is restored at the end.
    """
    with warnings.catch_warnings():
        # A cache that cannot be written, as on a full disk, costs time only.
        warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
        folder = cache_dir()
        if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
            yield
            return
        jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()  # else JAX keeps the folder it has opened
