"""Running and collecting sweeps: finished runs stay, failures are recorded, nothing is mixed."""

import csv
import dataclasses
import json
import shutil

import pytest

from tests.scaling.sweeps import sweep
from xlstm_jax.cli import exit_codes
from xlstm_jax.config import ConfigError
from xlstm_jax.errors import ArgumentError
from xlstm_jax.scaling import Local, collect, plan, run, runs, status
from xlstm_jax.train import lock
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.run import FitResult

SPECS = plan(sweep(budgets=[1e9]))


class Fit:
    """Stands for `train.fit`: notes its calls; `errors` of run names are raised."""

    def __init__(self):
        self.calls, self.errors, self.unfinished, self.unevaluated = [], {}, set(), set()

    def __call__(self, cfg, run_dir, *, flops_per_step):
        self.calls.append(cfg.name)
        if cfg.name in self.errors:
            raise self.errors[cfg.name]
        record = {"step": cfg.train.steps, "loss": 2.5, "step_time": 0.5}
        (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        finished = cfg.name not in self.unfinished
        evaluation = {"step": cfg.train.steps, "valid_loss": 3.0 + 1e-6 * cfg.model.dim}
        if cfg.name in self.unevaluated:
            evaluation = None
        return FitResult(state=None, step=0, finished=finished, evaluation=evaluation)


@pytest.fixture
def fit(monkeypatch, unchecked_types):
    fake = Fit()
    monkeypatch.setattr(runs, "fit", fake)
    return fake


def states(result):
    return [one.state for one in result]


def test_finished_runs_are_not_repeated(tmp_path, fit):
    assert states(run(SPECS[:2], tmp_path)) == ["finished"] * 2
    assert states(run(SPECS, tmp_path)) == ["finished"] * 4
    assert fit.calls == [spec.cfg.name for spec in SPECS]


def test_table_has_a_line_per_run(tmp_path, fit):
    run(SPECS, tmp_path)
    table = collect(tmp_path)
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    first = "run_id model num_params train_tokens train_flops context_length batch_size steps "
    first += "learning_rate seed"
    assert list(lines[0])[:10] == first.split()
    for spec, line, values in zip(SPECS, lines, table.records, strict=True):
        expected = {name: x for name, x in spec.record().items() if name != "name"}
        assert expected.items() <= values.items()
        assert float(line["val_loss"]) == values["val_loss"] == 3.0 + 1e-6 * spec.cfg.model.dim
        assert values["train_seconds"] == 0.5 * spec.cfg.train.steps
    assert table.unfinished == []


def test_failures_are_recorded_and_the_others_run(tmp_path, fit):
    names = [spec.cfg.name for spec in SPECS]
    fit.errors = {
        names[0]: DivergedError("too large a rate"),
        names[1]: ConfigError("no such file"),
        names[2]: OSError("disk"),
    }
    result = run(SPECS, tmp_path)
    assert states(result) == ["failed"] * 3 + ["finished"]
    assert [one.code for one in result] == [3, 2, 4, 0]
    assert result[0].reason == "DivergedError: too large a rate"
    table = collect(tmp_path)
    assert len(table.records) == 1 and table.unfinished == result[:3]
    # A divergence would repeat itself, the others need not.
    fit.errors, fit.calls = {}, []
    assert states(run(SPECS, tmp_path)) == ["failed", *["finished"] * 3]
    assert fit.calls == names[1:3]


def test_bug_is_recorded_with_its_traceback(tmp_path, fit):
    fit.errors = {SPECS[0].cfg.name: ZeroDivisionError("by zero")}
    assert run(SPECS[:1], tmp_path)[0].code == 1
    record = json.loads((tmp_path / SPECS[0].run_id / "failure.json").read_text())
    assert "Traceback" in record["traceback"][0]


def test_signal_stops_the_sweep(tmp_path, fit, monkeypatch):
    fit.unfinished = {SPECS[1].cfg.name}
    monkeypatch.setattr(status.checkpoint, "latest_step", lambda folder: 5)
    run(SPECS, tmp_path)
    assert fit.calls == [spec.cfg.name for spec in SPECS[:2]]


def test_run_without_its_last_evaluation_is_not_finished(tmp_path, fit):
    fit.unevaluated = {SPECS[0].cfg.name}
    assert states(run(SPECS[:2], tmp_path)) == ["planned", "finished"]


def test_time_of_a_run_is_the_sum_over_its_intervals(tmp_path):
    records = [
        {"step": 10, "loss": 3.0, "step_time": 0.5},
        {"step": 10, "valid_loss": 3.0},
        {"step": 30, "loss": 2.0, "step_time": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    runs.record_result(tmp_path, SPECS[0].record(), 2.5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["train_seconds"], result["train_loss"], result["val_loss"]) == (10.0, 2.0, 2.5)


@pytest.mark.parametrize(
    "error, code",
    [
        (MemoryError(), 4),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 4),
        (RuntimeError("INTERNAL"), 1),
    ],
)
def test_exhausted_memory_is_a_failure_of_the_machine(error, code):
    assert runs.exit_code(error) == code


def test_exit_codes_are_those_of_commands():
    for name in ("BAD_ARGUMENT", "DIVERGED", "MACHINE_FAILED"):
        assert getattr(runs, name) == getattr(exit_codes, name), name


def test_run_of_another_process_is_left_alone(tmp_path, fit):
    runs.prepare(tmp_path / SPECS[0].run_id, SPECS[0])
    with lock.hold(tmp_path / SPECS[0].run_id):
        assert states(run(SPECS[:2], tmp_path)) == ["running", "finished"]
    assert fit.calls == [SPECS[1].cfg.name]


def test_launcher_reports_starts_and_ends(tmp_path, fit):
    events = []
    launcher = Local(on_start=events.append, on_end=lambda one: events.append(one.state))
    run(SPECS[:1], tmp_path, launcher=launcher)
    assert events == [tmp_path / SPECS[0].run_id, "finished"]


def test_runs_of_another_plan_are_refused_with_their_fields(tmp_path, fit):
    run(SPECS, tmp_path)
    changed = dataclasses.replace(sweep().train, eps=1e-7)
    with pytest.raises(ConfigError, match=r"of another plan .*train\.eps: 1e-07, stored 1e-08"):
        run(plan(sweep(budgets=[1e9], train=changed)), tmp_path)
    with pytest.raises(ConfigError, match="not in this plan"):
        run(SPECS[:1], tmp_path)
    run(plan(sweep()), tmp_path)  # it may grow


def test_results_of_different_sources_are_not_mixed(tmp_path, fit, monkeypatch):
    run(SPECS[:2], tmp_path)
    monkeypatch.setattr(runs, "source_fingerprint", lambda: "0123456789ab")
    with pytest.raises(
        ConfigError, match="has 2 results of the source .* would be of 0123456789ab"
    ):
        run(SPECS, tmp_path)
    run(SPECS[:2], tmp_path)  # nothing new
    run(SPECS, tmp_path, allow_mixed=True)
    with pytest.raises(ConfigError, match="has results of 2 sources of xlstm_jax"):
        collect(tmp_path)
    table = collect(tmp_path, allow_mixed=True)
    assert [record["source"] == "0123456789ab" for record in table.records] == [
        False,
        False,
        True,
        True,
    ]


def test_duplicates_and_strays_are_refused(tmp_path, fit):
    run(SPECS[:2], tmp_path)
    shutil.copytree(tmp_path / SPECS[0].run_id, tmp_path / "copy")
    with pytest.raises(ConfigError, match="a duplicate; delete the copy"):
        collect(tmp_path)
    shutil.rmtree(tmp_path / "copy")
    records = [spec.record() for spec in SPECS[:1]]
    (tmp_path / "plan.json").write_text(json.dumps({"runs": records}))
    with pytest.raises(ConfigError, match=f"1 results of another plan .{SPECS[1].run_id}"):
        collect(tmp_path)


def test_changed_config_is_refused(tmp_path, fit):
    folder = tmp_path / SPECS[0].run_id
    runs.prepare(folder, SPECS[0])
    values = json.loads((folder / "config.json").read_text())
    values["train"]["lr"] = 1.0
    (folder / "config.json").write_text(json.dumps(values))
    (one,) = run(SPECS[:1], tmp_path)
    assert one.code == 2 and "but was changed" in one.reason


def test_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(ArgumentError, match=r"has no plan\.json of a sweep"):
        collect(tmp_path)


def test_source_fingerprint_depends_on_the_files(monkeypatch, tmp_path):
    from xlstm_jax.scaling import source

    values = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "__init__.py").write_text(text)
        monkeypatch.setattr(source.xlstm_jax, "__file__", str(tmp_path / "__init__.py"))
        values.append(source.source_fingerprint.__wrapped__())
    assert values[0] != values[1]
