"""The committed notebooks have outputs of a full run, are small and hold no paths of a machine.

`make notebooks` executes them.
"""

import pathlib

import pytest

from notebooks import run

README = (run.FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", run.paths(), ids=lambda path: path.stem)
def test_committed_notebook_breaks_no_rule(path):
    assert run.problems(path) == []


@pytest.mark.parametrize("path", run.paths(), ids=lambda path: path.stem)
def test_notebook_is_listed_with_the_time_of_its_full_run(path):
    (line,) = [line for line in README.splitlines() if f"]({path.name})" in line]
    own = run.read(path)["metadata"]["xlstm_jax"]
    assert f"| {own['cpu_seconds']} | {own['seconds']} | {own['date']} |" in line


def _edited(edit, folder: pathlib.Path) -> list[str]:
    """The problems of a copy of the first notebook after an edit."""
    path = run.paths()[0]
    notebook = run.read(path)
    edit(notebook)
    copy = folder / path.name
    run.write(notebook, copy)
    return run.problems(copy)


def _code(notebook) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _add_output(text: str, name: str = "stdout"):
    output = {"output_type": "stream", "name": name, "text": text}
    return lambda notebook: _code(notebook)[-1]["outputs"].append(output)


def _clear_outputs(notebook):
    for cell in _code(notebook):
        cell["outputs"] = []


def _large_picture(notebook):
    output = {"output_type": "display_data", "data": {"image/png": "A" * 500_000}, "metadata": {}}
    _code(notebook)[-1]["outputs"].append(output)


def _other_kernel(notebook):
    notebook["metadata"]["kernelspec"]["name"] = "mine"


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda notebook: notebook["cells"].pop(0), ["badge"]),
        (lambda notebook: _code(notebook)[0].update(source="import jax"), ["install", "full run"]),
        (lambda notebook: _code(notebook)[-1].update(source="x = 1"), ["full run"]),
        (_clear_outputs, ["no cell has a picture"]),
        (_add_output("written to /home/someone/runs"), ["the path '/home/someone'"]),
        (_add_output("UserWarning: x is deprecated", "stderr"), ["prints a warning"]),
        (_large_picture, ["the file is larger than 600", "a picture is larger than 300"]),
        (_other_kernel, ["kernel"]),
    ],
)
def test_broken_rule_is_reported(edit, words, tmp_path):
    messages = _edited(edit, tmp_path)
    assert len(messages) == len(words)
    assert all(word in message for word, message in zip(words, messages, strict=True))


def test_writing_a_notebook_again_changes_nothing(tmp_path):
    path = run.paths()[0]
    run.write(run.read(path), tmp_path / path.name)
    assert (tmp_path / path.name).read_text() == path.read_text()


def test_first_code_cell_installs_on_colab_alone():
    _, _, condition, install = run.INSTALL.splitlines()
    assert condition == 'if "google.colab" in sys.modules:'
    assert install.startswith("    %pip install ") and run.REPOSITORY in install
