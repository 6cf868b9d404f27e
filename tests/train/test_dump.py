"""Dumps of skipped steps, and their replay."""

import dataclasses
import json
import shutil

import numpy as np
import optax
import pytest

from xlstm_jax import cpu
from xlstm_jax.cli import main
from xlstm_jax.config import ConfigError
from xlstm_jax.data import loader
from xlstm_jax.train import DivergedError, checkpoint, fit, replay, restore_params

# Every gradient norm above the average is a spike, so finite updates are skipped.
STRICT = dict(guard_floor=0.0, guard_factor=1.001, lr=1e-4, schedule="constant")


@pytest.fixture(autouse=True)
def in_process(tiny_lm, monkeypatch):
    monkeypatch.setattr(cpu, "prepare", lambda: None)


@pytest.fixture(scope="module")
def diverged(tiny_lm, experiment, tmp_path_factory):
    """The directory of a run that ended after three skipped updates, which were finite."""
    cfg = experiment(steps=200, max_consecutive_skips=3, checkpoint_every=2, eval_every=0, **STRICT)
    run_dir = tmp_path_factory.mktemp("diverged") / "run"
    with pytest.raises(DivergedError, match="replay .*diverged.json` recomputes step"):
        fit(cfg, run_dir)
    return run_dir


@pytest.fixture
def run_dir(diverged, tmp_path):
    return shutil.copytree(diverged, tmp_path / "run")


def test_the_dump_of_a_diverged_run_is_replayed_bit_for_bit_without_its_data(run_dir, capsys):
    dump = json.loads((run_dir / "diverged.json").read_text())
    step = dump["first_skipped_step"]
    assert dump["diverged"] and len(dump["index_of_step"]) == 3
    assert checkpoint.steps(run_dir / "diverged") == [step]
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "metrics.jsonl").unlink()
    config = (run_dir / "diverged" / "config.json").read_text()
    values = json.loads(config)
    values["data"]["source"] = "/nowhere"
    (run_dir / "diverged" / "config.json").write_text(json.dumps(values))
    assert main(["replay", str(run_dir / "diverged.json")]) == 0
    text = capsys.readouterr().out
    assert "yes, bit for bit" in text and repr(dump["loss"]) in text
    assert "token_embedding/embedding" in text and "no gradient" in text


def test_a_number_that_is_not_reproduced_exits_with_5(run_dir, capsys):
    path = run_dir / "diverged.json"
    dump = json.loads(path.read_text())
    path.write_text(json.dumps(dump | {"loss": float(np.nextafter(dump["loss"], 9))}))
    assert main(["replay", str(path)]) == 5
    assert "reproduced     no" in capsys.readouterr().out


def test_gradient_norms_of_parameters_combine_to_the_norm_of_the_run(run_dir):
    result = replay.replay(run_dir / "diverged.json")
    norms = list(result.gradient_norms.values())
    assert np.linalg.norm(norms) == pytest.approx(result.grad_norm, rel=1e-5)
    assert result.from_step == result.dump.first_skipped_step


def test_a_skipped_step_of_a_run_that_went_on_is_replayed_from_its_checkpoint(
    tiny_lm, experiment, tmp_path
):
    cfg = experiment(steps=12, checkpoint_every=3, eval_every=0, **STRICT)
    fit(cfg, tmp_path / "run")
    path = tmp_path / "run" / "diverged.json"
    dump = json.loads(path.read_text())
    assert not dump["diverged"] and dump["loss"] > 0
    assert not (tmp_path / "run" / "diverged" / "checkpoints").exists()
    result = replay.replay(path)
    assert result.reproduced and result.from_step <= dump["first_skipped_step"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = replay.replay(path)  # from the start
    assert again.reproduced and again.from_step == 0


def test_a_gradient_that_is_not_finite_is_named(tiny_lm, experiment, tmp_path, capsys):
    cfg = experiment(steps=40, lr=1e38, warmup_steps=0, eval_every=0, checkpoint_every=0)
    with pytest.raises(DivergedError):
        fit(cfg, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "diverged.json").read_text())["loss"] == "nan"
    assert main(["replay", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "not finite     ffn/proj_down/bias" in text and "bit for bit" in text


def poisoned(cfg, steps):
    """The batches of a config; the weights in some steps are NaN."""
    examples, batches = loader.load(cfg.data, "train"), []
    for step in range(60):
        batch = loader.batch_at(examples, cfg.data, step)
        weights = np.full_like(batch.weights, np.nan) if step in steps else batch.weights
        batches.append(batch._replace(weights=weights))
    return batches


@pytest.mark.slow
def test_batches_of_the_caller_are_part_of_the_dump_but_an_optimizer_is_not(
    tiny_lm, experiment, tmp_path
):
    cfg = experiment(steps=12, max_consecutive_skips=2, eval_every=0)
    data = poisoned(cfg, {4, 5})
    with pytest.raises(DivergedError):
        fit(cfg, tmp_path / "data", data=data)
    assert replay.replay(tmp_path / "data" / "diverged.json").reproduced
    with pytest.raises(DivergedError):
        fit(cfg, tmp_path / "iterator", data=iter(data))
    with pytest.raises(ConfigError, match="batches that the caller of fit passed as data="):
        replay.replay(tmp_path / "iterator" / "diverged.json")
    with pytest.raises(DivergedError):
        fit(cfg, tmp_path / "tx", data=data, tx=optax.sgd(0.1))
    with pytest.raises(ConfigError, match="fit was called with tx=..., which no file describes"):
        replay.replay(tmp_path / "tx" / "diverged.json")


def damage(name, change):
    def apply(run_dir):
        path = run_dir / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def change_json(**fields):
    return damage("diverged.json", lambda data: json.dumps(json.loads(data) | fields).encode())


DAMAGES = {
    "not JSON": (damage("diverged.json", lambda data: data[:50]), "is not valid JSON"),
    "not a table": (damage("diverged.json", lambda data: b"[]"), "is not a dump of this version"),
    "earlier version": (
        damage("diverged.json", lambda data: b'{"first_skipped_step": 3}'),
        "no default",
    ),
    "word as a step": (change_json(first_skipped_step="x"), "first_skipped_step must be int"),
    "negative step": (change_json(first_skipped_step=-1), "must be at least 0"),
    "step before the state": (
        change_json(first_skipped_step=0),
        "must have a checkpoint up to step 0",
    ),
    "word as a loss": (change_json(loss="x"), "loss must be a number"),
    "skips": (change_json(skips=[[1]]), "must have 2 values"),
    "truncated batch": (damage("diverged/batch.npz", lambda data: data[:100]), "cannot be read"),
    "config": (damage("diverged/config.json", lambda data: b"{}"), "has no default"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_dump_is_a_one_line_error(run_dir, capsys, name):
    apply, words = DAMAGES[name]
    apply(run_dir)
    assert main(["replay", str(run_dir / "diverged.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_damaged_state_or_a_missing_dump_is_a_one_line_error(run_dir, tmp_path, capsys):
    victim = next((run_dir / "diverged" / "checkpoints").glob("*/state/_METADATA"))
    victim.write_bytes(victim.read_bytes()[:-1])
    for path in (run_dir / "diverged.json", tmp_path / "none.json"):
        assert main(["replay", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_other_data_are_rejected_if_a_replay_needs_them(tiny_lm, experiment, text, tmp_path):
    folder = shutil.copytree(text, tmp_path / "text")
    cfg = experiment(dict(source=str(folder)), steps=12, checkpoint_every=3, eval_every=0, **STRICT)
    fit(cfg, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (folder / "train" / "a.txt").write_text("other " * 3000)
    with pytest.raises(ConfigError, match="data.source must be the data of the run"):
        replay.replay(tmp_path / "run" / "diverged.json")


def test_a_dump_that_cannot_be_written_does_not_hide_the_divergence(
    tiny_lm, experiment, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("xlstm_jax.train.dump.write", lambda *_: open(tmp_path / "none" / "x"))
    cfg = experiment(steps=40, lr=1e38, warmup_steps=0, eval_every=0)
    with pytest.raises(DivergedError):
        fit(cfg, tmp_path / "run")
    assert "the dump of a skipped step failed" in caplog.text


def test_the_folder_of_a_dump_is_a_run_for_other_commands(run_dir, assert_same):
    cfg, params = restore_params(run_dir / "diverged")
    assert dataclasses.asdict(cfg) and params
