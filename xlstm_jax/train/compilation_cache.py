"""Compiled programs on disk, so that a second start of the same program compiles nothing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "cache"  # in the directory of a run; every command about that run uses it


@contextlib.contextmanager
def compiled_programs(run_dir: Path) -> Iterator[None]:
    """Within, compiled programs are kept in RUN/cache, unless the user has set another folder.

    The setting is global to the process: it is restored at the end.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str((run_dir / FOLDER).resolve()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
