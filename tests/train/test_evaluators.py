"""Evaluators: their schedule, their records, and that their errors do not end a run."""

import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.train import DivergedError, Evaluator, fit


def records(run_dir, prefix):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if any(key.startswith(prefix) for key in r)]


@pytest.fixture
def cfg(tiny_lm, experiment):
    return experiment(steps=7, eval_every=3, checkpoint_every=2)


def test_evaluators_run_on_their_schedule_and_at_the_end(cfg, tmp_path):
    def usual(params, step):
        return {"x": np.float32(step), "text": "a", "list": jnp.arange(2), "size": params["ffn"]
                ["proj_down"]["bias"].size}  # fmt: skip

    often = Evaluator("often", lambda params, step: {"nan": float("nan")}, every=2)
    fit(cfg, tmp_path / "run", evaluators=[Evaluator("usual", usual), often])
    usual_records = records(tmp_path / "run", "usual")
    assert [r["step"] for r in usual_records] == [3, 6, 7]
    assert usual_records[0] == {
        "step": 3, "usual_x": 3.0, "usual_text": "a", "usual_list": [0, 1], "usual_size": 8,
    }  # fmt: skip
    often_records = records(tmp_path / "run", "often")
    assert [(r["step"], r["often_nan"]) for r in often_records] == [
        (2, None), (4, None), (6, None), (7, None),
    ]  # fmt: skip


def test_evaluators_without_a_schedule_never_run(cfg, tmp_path, with_train):
    evaluator = Evaluator("x", lambda params, step: {"y": 1})
    fit(with_train(cfg, eval_every=0), tmp_path / "run", evaluators=[evaluator])
    assert not records(tmp_path / "run", "x_")


@pytest.mark.parametrize("result", [ZeroDivisionError("a\nb"), 3, {"x": object()}])
def test_an_evaluator_that_fails_is_logged_and_the_run_continues(cfg, tmp_path, caplog, result):
    def fn(params, step):
        if isinstance(result, Exception):
            raise result
        return result

    others = Evaluator("works", lambda params, step: {"x": 1})
    assert fit(cfg, tmp_path / "run", evaluators=[Evaluator("bad", fn), others]).finished
    assert len(caplog.records) == 3 and len(records(tmp_path / "run", "works")) == 3
    assert caplog.messages[0].startswith("the evaluator 'bad' failed at step 3 (")
    assert "\n" not in caplog.messages[0] and caplog.records[0].exc_info
    assert not records(tmp_path / "run", "bad")


@pytest.mark.parametrize("error", [DivergedError("stop"), KeyboardInterrupt()])
def test_divergence_and_interrupts_end_the_run(cfg, tmp_path, error):
    def fn(params, step):
        raise error

    with pytest.raises(type(error)):
        fit(cfg, tmp_path / "run", evaluators=[Evaluator("x", fn)])


def test_a_stop_request_defers_evaluators_to_the_resumed_run(cfg, tmp_path):
    steps = []

    def interrupt(params, step):
        steps.append(("first", step))
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)
        return {"x": 1}

    both = [
        Evaluator("first", interrupt),
        Evaluator("second", lambda params, step: steps.append(("second", step)) or {"x": 1}),
    ]
    assert fit(cfg, tmp_path / "run", evaluators=both).step == 3
    assert fit(cfg, tmp_path / "run", evaluators=both).finished
    assert steps == [(name, step) for step in (3, 6, 7) for name in ("first", "second")]
    assert [r["step"] for r in records(tmp_path / "run", "second")] == [3, 6, 7]


def test_names_must_be_new_and_printable(cfg, tmp_path, unchecked_types):
    def run(*names):
        fit(cfg, tmp_path / "run", evaluators=[Evaluator(name, dict) for name in names])

    for name in ("", "a b", "a/b", None):
        with pytest.raises(ConfigError, match="name of an Evaluator must be letters"):
            Evaluator(name, dict)
    with pytest.raises(ConfigError, match="every of the Evaluator 'a' must be at least 1, got 0"):
        Evaluator("a", dict, every=0)
    for names in (("a", "a"), ("valid",)):
        with pytest.raises(ConfigError, match="must have different names"):
            run(*names)
    with pytest.raises(ConfigError, match=r"write Evaluator\(name, fn\)"):
        fit(cfg, tmp_path / "run", evaluators=[dict])
    assert not (tmp_path / "run").exists()
