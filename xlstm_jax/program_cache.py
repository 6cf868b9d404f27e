"""Compiled programs on disk, shared by all runs of a user."""

import contextlib
import warnings
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from xlstm_jax.config import cache_dir


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
