"""The map of formal languages: figures of a cell, resuming, expectations, table of the README."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from experiments import formal_languages
from experiments.formal_languages import MODELS, TASKS, Options, best_of, config, outcome, table
from tests.data.test_formal_languages import SOLVERS
from xlstm_jax.config import ConfigError
from xlstm_jax.data import load

ROOT = pathlib.Path(__file__).parents[2]


def make_cell(task, model, longer, at_train=(0.5, 0.5, 0.5, 0.5)):
    scores = {"3-40": list(at_train), "40-256": list(longer)}
    grid = {"seeds": [0, 0, 1, 1], "lrs": [0.01, 0.003, 0.01, 0.003]}
    return {"task": task, "model": model, "scaled_accuracy": scores, "seconds": 1.0, **grid}


def constant(task, model, value):
    return make_cell(task, model, [value] * 4)


def test_the_best_learning_rate_has_the_best_mean_over_seeds():
    best = best_of(make_cell("parity", "lstm", [1.0, 0.4, 0.0, 0.8], [0.1, 0.2, 0.3, 0.4]))
    assert best.lr == 0.003
    assert best.mean == pytest.approx(0.6) and best.spread == pytest.approx(0.2)
    assert best.at_train_lengths == pytest.approx(0.3)  # at the same rate


def test_memory_mixing_must_be_ahead_in_the_mean_of_the_regular_languages():
    def cells(of_lstm):
        values = {name: 0.96 if MODELS[name].has_memory_mixing else 0.2 for name in MODELS}
        regular = [name for name in TASKS if TASKS[name].category == "regular"]
        assert len(regular) == 4
        return [
            constant(task, name, of_lstm if (task, name) == (regular[-1], "lstm") else value)
            for task in regular
            for name, value in values.items()
        ]

    assert all(outcome(cells(of_lstm=0.0)).values())
    failed = [name for name, holds in outcome(cells(of_lstm=-2.5)).items() if not holds]
    assert failed == ["regular languages: every model with memory mixing above every other"]


def test_one_seed_is_enough_to_solve_parity_and_too_many_for_a_negative_control():
    one = [1.0, 0.0, 0.0, 0.0]
    cells = [make_cell("parity", "lstm", one), make_cell("parity", "llama", one)]
    assert list(outcome(cells).values()) == [True, False]


def test_expectations_need_all_of_their_cells():
    cells = [constant("set", name, 0.1) for name in MODELS]
    assert outcome(cells) == {"set: every model below 0.3": True}
    assert outcome(cells[:-1]) == {}


@pytest.mark.slow
def test_finished_cells_are_not_computed_again(tmp_path, monkeypatch):
    computed = []

    def run_cell(cfg, sweep):
        computed.append(cfg.name)
        return {k: v for k, v in constant("", "", 0.5).items() if k not in ("task", "model")}

    monkeypatch.setattr(formal_languages, "run_cell", run_cell)
    one = Options(
        task="set", model="lstm", size="smoke", run_dir=tmp_path, out=tmp_path / "map.json"
    )
    assert formal_languages.main(one) == 0
    assert formal_languages.main(dataclasses.replace(one, model="all")) == 0
    elsewhere = dataclasses.replace(one, run_dir=tmp_path / "elsewhere")
    assert formal_languages.main(elsewhere) == 0  # cells are in the result too
    assert computed == [f"set-{name}" for name in MODELS]
    result = json.loads((tmp_path / "map.json").read_text())
    assert [cell["model"] for cell in result["cells"]] == [*MODELS]
    assert 0 < (tmp_path / "map.png").stat().st_size < 300 * 1024
    # Another setting is another cell.
    sweep = formal_languages.SIZES["smoke"]._replace(steps=30)
    monkeypatch.setitem(formal_languages.SIZES, "smoke", sweep)
    formal_languages.main(one)
    assert computed[len(MODELS) :] == ["set-lstm"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_config_of_its_vocabulary(task):
    cfg = config("paper", task, "llama")
    assert cfg.model.vocab_size == load(cfg.data, "train").vocab_size
    assert cfg.model.num_blocks == 2 and cfg.data.max_len == 40
    assert (cfg.train.steps, cfg.data.batch_size) == (100_000, 256)
    assert cfg.train.lr * cfg.train.end_factor == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("huge",), "size='huge' is unknown; use one of: smoke, cpu, paper"),
        (("cpu", "sorting"), "task='sorting' is unknown; use one of: parity, even_pairs"),
        (("cpu", "parity", "gru"), "model='gru' is unknown; use one of: lstm, lstm_block"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, message):
    with pytest.raises(ConfigError, match=message):
        config(*arguments)


def test_the_readme_has_a_line_for_each_of_the_fifteen_tasks():
    """A line has the task, the test of its generator, its command, and a figure for each model."""
    section = (ROOT / "experiments/README.md").read_text().split("## Formal languages")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    entries = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(entries) == 15 and [entry[0] for entry in entries] == [*TASKS]
    for task, test, command, *figures in entries:
        path = re.fullmatch(rf"`pytest (\S+) -k {task}`", test)
        assert path and (ROOT / path[1]).exists() and task in SOLVERS
        assert command == f"`python experiments/formal_languages.py --task {task}`"
        assert len(figures) == len(MODELS)


def test_the_figures_of_the_readme_are_those_of_the_stored_map():
    cells = json.loads((ROOT / "experiments/results/formal_languages.json").read_text())["cells"]
    text = (ROOT / "experiments/README.md").read_text()
    missing = [line for line in table(cells) if line not in text]
    assert not missing, "paste the lines that experiments/formal_languages.py prints"


@pytest.mark.slow
def test_a_cell_of_the_smallest_size_has_a_figure_for_every_member(tmp_path):
    options = Options(
        task="modular_arithmetic", model="lstm", size="smoke", run_dir=tmp_path, out=tmp_path / "o"
    )
    assert formal_languages.main(options) == 0
    (cell,) = json.loads((tmp_path / "o").read_text())["cells"]
    assert cell["lrs"] == [0.01, 0.003, 0.01, 0.003] and cell["seeds"] == [0, 0, 1, 1]
    for scores in cell["scaled_accuracy"].values():
        assert len(scores) == 4 and np.isfinite(scores).all() and max(scores) <= 1
