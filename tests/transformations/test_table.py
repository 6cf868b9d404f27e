"""The table of `docs/transformations.md`: every cell names a test that exists, or a reason."""

import importlib
import itertools
import pathlib
import re

import pytest

from tests.transformations.cases import CASES

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "transformations.md"
FILES = ("derivatives", "mapping", "programs", "modes")


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, line by line, with its header."""
    section = re.split(rf"^## {heading}$", PAGE.read_text(), flags=re.MULTILINE)[1]
    lines = itertools.takewhile(lambda line: not line.startswith("## "), section.splitlines())
    split = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return [[cell.strip(" `") for cell in line] for line in split if "---" not in line[0]]


def by_code(heading: str) -> dict[str, str]:
    """Code -> test or reason."""
    return {code: text for code, text, *_ in table(heading)[1:]}


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
    """(function, transformation, code) of every cell."""
    (_, *transformations), *lines = table("Table")
    return [
        (name, *cell) for name, *codes in lines for cell in zip(transformations, codes, strict=True)
    ]


def test_table_lists_every_case():
    assert [name for name, *_ in table("Table")[1:]] == [case.name for case in CASES]


def test_every_cell_names_a_test_or_gives_a_reason():
    tests, reasons = by_code("Tests"), by_code("Reasons")
    ids, root = collected(), PAGE.parents[1]
    for name, transformation, code in cells():
        if code not in reasons:
            test = tests[code].replace("NAME", name)
            assert test in ids or (root / test).is_file(), f"{name}, {transformation}: {test}"


def test_every_test_of_a_case_is_in_the_table():
    tests = by_code("Tests")
    listed = {tests[code].replace("NAME", name) for name, _, code in cells() if code in tests}
    names = "|".join(re.escape(case.name) for case in CASES)
    of_cases = {test for test in collected() if re.search(rf"\[({names})(-float64)?\]$", test)}
    assert of_cases <= listed


@pytest.mark.parametrize("heading", ["Tests", "Reasons"])
def test_every_code_is_used(heading):
    assert set(by_code(heading)) <= {code for _, _, code in cells()}
