"""Imports of the data package, and its cleanup at exit."""

import ast
import pathlib
import subprocess
import sys

import pytest

import xlstm_jax.data

FOLDER = pathlib.Path(xlstm_jax.data.__file__).parent
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py"))


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", FILES)
def test_data_imports_neither_jax_nor_flax_and_imports_grain_lazily(name):
    tree = ast.parse((FOLDER / name).read_text())
    assert not {"jax", "flax"} & set(imported(ast.walk(tree)))
    assert "grain" not in set(imported(tree.body))


def test_leaving_a_loop_early_prints_no_traceback_at_exit():
    program = (
        "from xlstm_jax.data import DataConfig, batches, load\n"
        "cfg = DataConfig(source='parity', seq_len=16, batch_size=4)\n"
        "with batches(load(cfg, 'train'), cfg) as iterator:\n"
        "    for batch in iterator: break\n"
    )
    root = FOLDER.parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
