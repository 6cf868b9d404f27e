"""The table of mutations fits the library; `python -m tests.mutations.run` tries each."""

import pathlib
import py_compile

import pytest

from tests.mutations import run
from tests.mutations.table import MUTATIONS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda x: f"{x.file}: {x.new.strip()[:30]}")
def test_mutation_applies_once_and_compiles(mutation, tmp_path):
    target = tmp_path / mutation.file
    run.copy(ROOT / mutation.file, target)
    original = run.apply(mutation, tmp_path)
    assert original.count(mutation.old) == 1
    assert target.read_text() != original
    py_compile.compile(str(target), cfile=str(tmp_path / "compiled"), doraise=True)
    for part in mutation.test.split():
        assert not part.startswith("tests/") or (ROOT / part).exists()
