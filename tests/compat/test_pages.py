"""The code blocks of the pages about layers, forecasting and reinforcement learning run."""

import pathlib
import re

import pytest

from xlstm_jax import cpu

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["drop_in", "forecasting", "reinforcement_learning"])
def test_code_blocks_run_and_print_the_stated_output(page, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "prepare", lambda: True)  # it would change this process
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)
    names = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
    lines = [line for line in capsys.readouterr().out.splitlines() if "pinball loss" not in line]
    assert lines == re.findall(r"^print\(.*\)  # (?:-> )?(.+)$", "\n".join(blocks), re.M)
