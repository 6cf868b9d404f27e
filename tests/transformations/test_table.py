"""The table of `docs/transformations.md`: every cell names a test that exists, or a reason."""

import importlib
import itertools
import pathlib
import re

import pytest

from tests.transformations.rows import ROWS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "transformations.md"
FILES = ("derivatives", "mapping", "programs", "modes")


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, its first row included."""
    section = re.split(rf"^## {heading}$", PAGE.read_text(), flags=re.MULTILINE)[1]
    lines = itertools.takewhile(lambda line: not line.startswith("## "), section.splitlines())
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip(" `") for cell in row] for row in rows if "---" not in row[0]]


def ids_of(function) -> list[str]:
    """The ids of the parametrized cases of a test."""
    parameters = [mark.args[1] for mark in function.pytestmark if mark.name == "parametrize"]
    names = [[getattr(case, "id", None) or str(case) for case in cases] for cases in parameters]
    return ["-".join(case) for case in itertools.product(*names)]


def collected() -> set[str]:
    """The ids of all tests of the table's files, relative to this folder."""
    ids = set()
    for name in FILES:
        module = importlib.import_module(f"tests.transformations.test_{name}")
        for function in vars(module).values():
            if getattr(function, "__name__", "").startswith("test_"):
                cases = ids_of(function) if hasattr(function, "pytestmark") else []
                ids |= {f"test_{name}.py::{function.__name__}[{case}]" for case in cases}
    return ids


def cells() -> list[tuple[str, str, str]]:
    """(row, column, content) of every cell."""
    header, *rows = table("Table")
    return [(row[0], *cell) for row in rows for cell in zip(header[1:], row[1:], strict=True)]


def test_every_function_has_a_row():
    assert [row[0] for row in table("Table")[1:]] == [row.name for row in ROWS]


def test_every_cell_names_a_test_or_gives_a_reason():
    tests, reasons = (dict(row[:2] for row in table(name)[1:]) for name in ("Tests", "Reasons"))
    ids, root = collected(), PAGE.parents[1]
    for row, column, content in cells():
        if content not in reasons:
            test = tests[content].replace("ROW", row)
            assert test in ids or (root / test).is_file(), f"{row}, {column}: {test}"


def test_every_test_of_a_row_is_in_the_table():
    tests = dict(row[:2] for row in table("Tests")[1:])
    named = {tests[cell].replace("ROW", row) for row, _, cell in cells() if cell in tests}
    rows = "|".join(re.escape(row.name) for row in ROWS)
    of_rows = {case for case in collected() if re.search(rf"\[({rows})(-float64)?\]$", case)}
    assert of_rows <= named


@pytest.mark.parametrize("name", ["Tests", "Reasons"])
def test_every_code_is_used(name):
    assert {row[0] for row in table(name)[1:]} <= {content for _, _, content in cells()}
