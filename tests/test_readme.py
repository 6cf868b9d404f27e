"""What the README says is true: its commands exist, its example runs, its links lead somewhere."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_block(language: str) -> str:
    """The first block of this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[:1]
    return block


def test_the_set_up_is_two_commands():
    commands = [line.split("#")[0].strip() for line in code_block("sh").splitlines()]
    assert commands == ["make train", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", makefile, re.M) for command in commands)


def test_the_example_fits_in_twenty_lines():
    assert len([line for line in code_block("python").splitlines() if line.strip()]) <= 20


@pytest.mark.slow
def test_the_example_runs_and_prints_what_it_says(capsys):
    example = code_block("python")
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out.split() == re.findall(r"print\(.*\)  # (\d+)", example)
    assert names["losses"].shape == (8,)
    finite = jax.tree.map(lambda gradient: jnp.isfinite(gradient).all(), names["gradients"])
    assert all(jax.tree.leaves(finite))


@pytest.mark.parametrize("page", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]
