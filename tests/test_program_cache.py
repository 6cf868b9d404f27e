"""The cache of compiled programs costs no run its life."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from xlstm_jax.program_cache import compiled_programs


@pytest.mark.parametrize("folder", ["~nobody_of_this_name/cache", "a file"])
def test_programs_are_compiled_without_a_cache(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XLSTM_CACHE_DIR", str(tmp_path / "file") if folder == "a file" else folder)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        with compiled_programs():
            assert jax.jit(lambda x: x + 1)(1.0) == 2.0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
