"""The README is short and its commands exist; links and file names of all pages are valid.

`test_docs.py` runs the code of all pages.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_block(language: str, text: str = README) -> str:
    """The first code block of a language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[:1]
    return block


def test_setup_is_two_make_commands():
    commands = [line.split("#")[0].strip() for line in code_block("sh").splitlines()]
    assert commands == ["make train", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.M) for command in commands)


def test_example_has_at_most_20_lines():
    assert len([line for line in code_block("python").splitlines() if line.strip()]) <= 20


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")]
PAGES += [*ROOT.glob("pallas_kernels/*.md"), *ROOT.glob("tests/golden/*.md")]
PAGES += [*ROOT.glob("notebooks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_existing_files(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_file_names_in_the_text_exist(page):
    if page.name == "CHANGELOG.md":  # also names removed files
        return
    names = re.findall(
        r"`((?:xlstm_jax|tests|pallas_kernels|experiments|docs)/[\w/]+\.\w+)`", page.read_text()
    )
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not [
        name for name in missing if not re.search(r"[A-Z]{2}", name)
    ]  # NAME is a placeholder
