"""Records of experiments: their files, the expectations that hold, and the exit code."""

import json

import pytest

from experiments import record
from xlstm_jax.config import ConfigError


def test_an_expectation_that_does_not_hold_is_printed_and_is_the_exit_code(capsys):
    outcome = {"fast": True, "small": None, "exact": False}
    assert record.print_outcome("cpu", outcome) == 1
    assert capsys.readouterr().out.splitlines() == [
        "yes  fast",
        "not measured  small",
        "NO   exact",
    ]
    assert record.print_outcome("smoke", outcome) == 0
    assert record.print_outcome("cpu", {"fast": True, "small": None}) == 0


@pytest.mark.parametrize("holds", [True, False])
def test_a_record_is_written_with_its_plot(holds, tmp_path, capsys):
    plots = []
    result = {"size": "cpu", "outcome": {"exact": holds}}
    path = tmp_path / "results" / "r.json"
    code = record.save(result, path, lambda *arguments: plots.append(arguments))
    assert code == (0 if holds else 1)
    assert json.loads(path.read_text()) == result
    assert plots == [(result, tmp_path / "results" / "r.png")]
    assert capsys.readouterr().out.endswith("r.json and r.png\n")


def test_the_head_of_a_record_has_the_command():
    head = record.start("comparison", "smoke")
    assert head["experiment"] == "comparison" and head["size"] == "smoke"
    assert head["command"] == "python experiments/comparison.py --size smoke"
    assert {"date", "versions"} <= head.keys() and "benchmark" not in head


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="size='huge' is unknown; use one of: smoke, cpu"):
        record.check_size("huge", ("smoke", "cpu"))
    for names in (("a", "c"), ()):
        with pytest.raises(ConfigError, match="model='c?' is unknown; use one of: a, b"):
            record.check_names(names, ("a", "b"))
