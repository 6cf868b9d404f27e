"""The README is correct: its commands exist, its example runs, its links resolve."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from xlstm_jax import cpu

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


@pytest.mark.slow
def test_example_runs_and_prints_the_stated_output(capsys):
    example = code_block("python")
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out.split() == re.findall(r"print\(.*\)  # (\d+)", example)
    assert names["losses"].shape == (8,)
    finite = jax.tree.map(lambda gradient: jnp.isfinite(gradient).all(), names["gradients"])
    assert all(jax.tree.leaves(finite))


@pytest.mark.slow
def test_example_of_activations_prints_a_line_per_layer(capsys):
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/activations.md").read_text(), re.S
    )
    exec(compile(example, "activations.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["m0", "m1", "s0"]


@pytest.mark.slow
def test_own_train_loop_of_the_docs_reduces_the_loss(monkeypatch):
    monkeypatch.setattr(cpu, "prepare", lambda: True)  # it would change this process
    example, names = code_block("python", (ROOT / "docs/own_loop.md").read_text()), {}
    exec(compile(example, "own_loop.md", "exec"), names)
    first = names["loss_fn"](
        names["model"].init(jax.random.key(1), names["tokens"]), names["tokens"]
    )
    assert names["loss"] < first


@pytest.mark.slow
def test_own_meshes_of_the_docs_run_and_print_the_stated_output(capsys, monkeypatch):
    make_mesh = functools.partial(jax.make_mesh, devices=jax.devices()[:4])
    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    example = code_block("python", (ROOT / "docs/own_mesh.md").read_text())
    exec(compile(example, "own_mesh.md", "exec"), {})
    assert capsys.readouterr().out.split() == re.findall(r"print\(.*\)  # (\w+)", example)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")]
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
