"""Metrics of an interval, writers, timing and the loss plot."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from xlstm_jax.train import metrics, plots
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.progress import Progress
from xlstm_jax.train.writers import ConsoleWriter, JsonlWriter


def step(loss, tokens, skipped=0, **values):
    names = metrics.PER_TOKEN + metrics.PER_STEP + metrics.SUMMED + metrics.LAST + metrics.MAXIMUM
    values = dict(loss=loss, tokens=tokens, skipped=skipped) | values
    return {name: jnp.asarray(values.get(name, 0.0)) for name in names}


def total(*steps):
    totals = metrics.empty()
    for step_metrics in steps:
        totals = metrics.add(totals, step_metrics)
    return totals


def test_losses_are_weighted_by_tokens_and_norms_by_steps():
    summary = metrics.summarize(
        total(
            step(2.0, 30.0, grad_norm=1.0, lr=0.1, documents=2),
            step(4.0, 10.0, grad_norm=2.0, lr=0.2, documents=3),
        )
    )
    assert summary["loss"] == pytest.approx(2.5)
    assert summary["perplexity"] == pytest.approx(np.exp(2.5))
    assert summary["grad_norm"] == pytest.approx(1.5)
    assert summary["lr"] == pytest.approx(0.2)
    assert (summary["tokens"], summary["documents"], summary["skipped"]) == (40, 5, 0)


def test_a_learning_rate_that_steps_do_not_report_is_absent():
    without = step(2.0, 30.0)
    del without["lr"]
    assert "lr" not in metrics.summarize(total(without, without))
    assert metrics.summarize(total(step(2.0, 30.0, lr=0.0)))["lr"] == 0


def test_a_skipped_step_is_counted_but_enters_no_mean():
    nan = float("nan")
    summary = metrics.summarize(
        total(
            step(2.0, 30.0, grad_norm=1.0),
            step(nan, 10.0, skipped=1, skipped_in_a_row=1, grad_norm=nan),
            step(3.0, 30.0, grad_norm=3.0),
        )
    )
    assert summary["loss"] == pytest.approx(2.5) and summary["grad_norm"] == pytest.approx(2.0)
    assert (summary["skipped"], summary["skipped_in_a_row"], summary["tokens"]) == (1, 1, 70)


def test_the_tokens_of_a_batch_with_weights_of_nan_are_not_counted():
    nan = float("nan")
    summary = metrics.summarize(total(step(2.0, 30.0), step(nan, nan, skipped=1, documents=2)))
    assert (summary["tokens"], summary["documents"], summary["loss"]) == (30, 2, 2.0)


def test_an_interval_of_skipped_steps_has_no_loss():
    summary = metrics.summarize(total(step(float("nan"), 5.0, skipped=1)))
    assert summary["loss"] is summary["perplexity"] is summary["grad_norm"] is None


def test_totals_round_trip_through_json_exactly(assert_same):
    totals = total(step(1 / 3, 7.0, grad_norm=1e-30), step(np.pi, 11.0, lr=1e-3))
    progress = Progress(step=2, totals=totals)
    values = json.loads(json.dumps(progress.to_json() | {"data": {"sha256": "abc"}}))
    restored, data = Progress.from_json(values)
    assert restored.step == 2 and data == {"sha256": "abc"}
    assert_same(restored.totals, totals)


def test_totals_can_be_donated():
    add = jax.jit(metrics.add, donate_argnums=0)
    assert float(add(metrics.empty(), step(1.0, 1.0)).steps) == 1


def test_non_finite_values_become_null(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": float("nan"), "lr": 0.1})
    writer.write(2, {"loss": 1.0, "none": None})
    writer.write(3, {"gates": {"0m": {"m_max": [float("inf"), 1.0]}}})
    writer.close()
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": None, "lr": 0.1}
    assert json.loads(lines[1]) == {"step": 2, "loss": 1.0, "none": None}
    assert json.loads(lines[2]) == {"step": 3, "gates": {"0m": {"m_max": [None, 1.0]}}}


RECORD = {"loss": 1.5, "skipped": 2, "step_time": 0.5, "tokens_per_second": 12345.6}
EVALUATION = {"valid_loss": 1.25, "valid_accuracy": 0.5, "valid_bits_per_byte": 1.803}


def show(is_terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=100, color_system=None)
    writer = ConsoleWriter(200, 40, console)
    writer.write(80, RECORD)
    writer.write(80, EVALUATION)
    writer.close()
    return file.getvalue()


def test_piped_output_has_one_line_per_record():
    first, second = show(is_terminal=False).splitlines()
    assert first == "step 80/200  loss 1.5000  12,346 tokens/s  2 skipped  1:00 left"
    assert second == "step 80/200  validation loss 1.2500  bits per byte 1.803  accuracy 0.500"


def test_results_of_evaluators_are_printed_and_statistics_are_not():
    file = io.StringIO()
    writer = ConsoleWriter(200, 40, Console(file=file, width=100))
    writer.write(80, {"gates": {"0m": {"m_max": [1.0]}}})
    writer.write(80, {"mine_loss": 1.23456, "mine_text": "a b"})
    assert file.getvalue() == "step 80/200  mine_loss 1.235  mine_text a b\n"


def test_a_terminal_shows_a_bar_with_the_time_left():
    text = show(is_terminal=True)
    assert "80/200" in text and "1:00 left" in text and "━" in text
    assert "bits per byte 1.803" in text


def test_the_clock_excludes_pauses_and_counts_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("xlstm_jax.train.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.step()
    assert clock.lap() == {}  # compiling
    clock.start()
    with clock.measure("wait"):
        now[0] += 1.0
    clock.step()
    now[0] += 5.0
    clock.step()
    with clock.measure("evaluate"):
        now[0] += 100.0
    assert clock.lap() == {"step_time": 3.0, "data_wait": 0.5}
    assert clock.lap() == {}


def test_goodput_is_the_share_of_time_in_steps(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("xlstm_jax.train.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 5.0
    clock.ready()
    for part in ("compile", "wait", "evaluate", "save"):
        with clock.measure(part):
            now[0] += 10.0
    now[0] += 15.0  # steps
    expected = {"restore": 5.0, "compile": 10.0, "wait": 10.0, "save": 10.0, "evaluate": 10.0}
    assert clock.parts == expected and clock.total() == 60.0
    assert clock.goodput() == pytest.approx(0.25)


@pytest.mark.parametrize("count", [0, 1, 500])
def test_the_loss_curve_is_a_small_png(tmp_path, count):
    records = [{"step": 10 * i, "loss": 5.5 / (1 + 0.1 * i)} for i in range(1, count + 1)]
    records += [{"step": 5, "loss": None}]
    records += [dict(step=10 * i, **EVALUATION) for i in range(100, count, 100)]
    plots.loss_curve(records, tmp_path / "loss.png", "tiny")
    data = (tmp_path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) < 300 * 1024
