"""`xlstm-jax sweep`: plans from a file, states and exit codes, the plan with estimated minutes."""

import json

import pytest

from tests.scaling.sweeps import sweep
from xlstm_jax.cli import sweep as command
from xlstm_jax.cli.commands import main
from xlstm_jax.scaling import estimate, plan, runs
from xlstm_jax.scaling.estimate import Speed
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.run import FitResult

PLAN = """
from tests.scaling.sweeps import sweep as small

def sweep(size="cpu"):
    return small(budgets=[1e9] if size == "smoke" else [1e9, 3e9])
"""


@pytest.fixture
def paths(tmp_path, monkeypatch, unchecked_types):
    monkeypatch.setattr(command, "exit_on_signal", command.contextlib.nullcontext)
    monkeypatch.setattr("xlstm_jax.cpu.prepare", lambda: True)
    (tmp_path / "micro.py").write_text(PLAN)
    return str(tmp_path / "micro.py"), tmp_path / "out"


@pytest.fixture
def diverging(monkeypatch):
    """Names of runs that diverge; the others are trained in no time."""
    names = set()

    def fit(cfg, run_dir, *, flops_per_step):
        if cfg.name in names:
            raise DivergedError("8 updates were skipped")
        evaluation = {"step": cfg.train.steps, "valid_loss": 2.0}
        return FitResult(state=None, step=cfg.train.steps, finished=True, evaluation=evaluation)

    monkeypatch.setattr(runs, "fit", fit)
    return names


def test_sweep_trains_all_runs_and_writes_the_table(paths, diverging, capsys):
    file, out = paths
    assert main(["sweep", file, "--size", "smoke", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("  finished\n") == 4 and "finished  4 of 4 runs" in text
    assert len((out / "table.csv").read_text().splitlines()) == 5


def test_exit_code_is_the_largest_of_the_runs(paths, diverging, capsys):
    file, out = paths
    spec = plan(sweep(budgets=[1e9]))[1]
    diverging.add(spec.cfg.name)
    assert main(["sweep", file, "--size", "smoke", "--out", str(out)]) == 3
    text = capsys.readouterr().out
    assert "failed 1 of 4 runs" in " ".join(text.split())
    assert f"{spec.run_id}  {spec.cfg.name}: DivergedError: 8 updates were skipped" in text


def test_json_has_runs_and_results(paths, diverging, capsys):
    file, out = paths
    assert main(["sweep", file, "--size", "smoke", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in result["runs"]] == ["finished"] * 4
    assert [record["val_loss"] for record in result["records"]] == [2.0] * 4


def test_dry_run_prints_the_plan_and_trains_nothing(paths, monkeypatch, capsys):
    file, out = paths
    speeds = dict.fromkeys(("xlstm", "llama"), Speed([1e6], [0.6], 30.0))
    monkeypatch.setattr(command, "calibrate", lambda specs: speeds)
    assert main(["sweep", file, "--out", str(out), "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    specs = plan(sweep())
    steps = sum(spec.cfg.train.steps for spec in specs)
    assert result["minutes_left"] == pytest.approx((8 * 30 + 0.6 * steps) / 60)
    assert [run["run_id"] for run in result["runs"]] == [spec.run_id for spec in specs]
    assert {run["state"] for run in result["runs"]} == {"planned"} and not out.exists()
    assert main(["sweep", file, "--out", str(out), "--dry-run"]) == 0
    assert "llama_d24_l1_h2_T32_C3e+09_s0" in capsys.readouterr().out


def test_errors_are_one_line(paths, capsys, tmp_path):
    file, _ = paths
    assert main(["sweep", str(tmp_path / "absent.py")]) == 2
    assert "must be an existing .py file" in capsys.readouterr().err
    (tmp_path / "other.py").write_text("def sweep():\n    return 1\n")
    assert main(["sweep", str(tmp_path / "other.py")]) == 2
    assert "must return Sweep, got int" in capsys.readouterr().err
    (tmp_path / "none.py").write_text("")
    assert main(["sweep", str(tmp_path / "none.py")]) == 2
    assert "has no function sweep(); define sweep(size=...)" in capsys.readouterr().err
    assert main(["sweep", file, "--slurm.nodes", "0"]) == 2
    assert "slurm.nodes must be at least 1" in capsys.readouterr().err


def test_steps_are_interpolated_between_the_smallest_and_the_largest_run():
    specs = [spec for spec in plan(sweep()) if spec.model == "xlstm"]
    small, large = (spec.train_flops / spec.cfg.train.steps for spec in specs[:2])
    speeds = {"xlstm": Speed([small, large], [1.0, 3.0], 10.0)}
    for spec, seconds in zip(specs[:2], (1.0, 3.0), strict=True):
        assert estimate.estimate(spec, speeds) == 10 + seconds * spec.cfg.train.steps


def test_calibration_times_the_ends_of_each_family(monkeypatch, unchecked_types):
    names = []

    def fit(cfg, run_dir, *, on_metrics):
        names.append((cfg.name, cfg.train.steps, cfg.train.eval_every))
        for step, seconds in ((4, 2.5), (8, 0.5), (12, 0.7)):
            on_metrics(step, {"step_time": seconds})

    monkeypatch.setattr(estimate, "fit", fit)
    speeds = estimate.calibrate(plan(sweep(seeds=(0, 1))))
    assert [name.split("_T")[0] for name, *_ in names] == [
        "xlstm_d16_l1_h2", "xlstm_d24_l1_h2", "llama_d16_l1_h2", "llama_d24_l1_h2"
    ]  # fmt: skip
    assert all(steps == 12 and eval_every == 0 for _, steps, eval_every in names)
    assert speeds["xlstm"].seconds == pytest.approx([0.6, 0.6])
    assert speeds["xlstm"].start_seconds == pytest.approx(4 * (2.5 - 0.6))
