"""`xlstm-jax check` detects wrong implementations, and "auto" never selects one that failed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import common
from pallas_kernels.hardware import ARCHITECTURES
from xlstm_jax.cli import check as command
from xlstm_jax.cli.exit_codes import DONE, MACHINE_FAILED
from xlstm_jax.ops import device_check, dispatch, verdicts
from xlstm_jax.ops.device_check import Outcome, Workload
from xlstm_jax.ops.mlstm import segments
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS

SMALL = Workload("mlstm", 1, 24, 1, 4, 6, "float32")
PASSED = {"passed": True, "reason": "", "fastest": False}
FAILED = {"passed": False, "reason": "error 0.5 of h", "fastest": False}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of verdicts."""
    monkeypatch.setattr(verdicts, "_path", lambda: tmp_path / "cache" / verdicts.FILE)
    verdicts._verdicts.cache_clear()
    yield tmp_path / "cache"
    verdicts._verdicts.cache_clear()


@pytest.fixture
def small(monkeypatch):
    """Only one small workload is checked."""
    monkeypatch.setattr(device_check, "workloads", lambda platform: [SMALL])
    monkeypatch.setattr(device_check, "REPEATS", 1)


def chosen(implementation="auto") -> str:
    """The implementation that "auto" selects for a small call."""
    call = dispatch.Call(1, 24, 1, 4, 6, jnp.dtype("float32"), "cpu")
    entry = dispatch.choose("mlstm", IMPLEMENTATIONS, implementation, call)
    return next(name for name, value in IMPLEMENTATIONS.items() if value is entry)


def replace(monkeypatch, name, fn):
    entry = dataclasses.replace(IMPLEMENTATIONS[name], fn=fn)
    monkeypatch.setitem(IMPLEMENTATIONS, name, entry)


def test_correct_implementations_pass_and_are_recorded(folder, small, unchecked_types, capsys):
    assert command.run([]) == DONE
    assert "chunkwise" in capsys.readouterr().out
    stored = json.loads((folder / verdicts.FILE).read_text())
    (entry,) = stored.values()
    assert entry["device"] == verdicts.describe()
    assert {name: x["passed"] for name, x in entry["verdicts"]["mlstm"].items()} == {
        "chunkwise": True,
        "parallel": True,
    }


@pytest.mark.parametrize("wrong", ["h", "state", "NaN", "error"])
def test_wrong_implementation_fails_and_auto_does_not_select_it(
    folder, small, monkeypatch, unchecked_types, capsys, wrong
):
    correct = IMPLEMENTATIONS["chunkwise"].fn

    def compute(*args):
        h, state = correct(*args)
        if wrong == "error":
            raise RuntimeError("no such instruction")
        if wrong == "state":
            return h, state._replace(C=1.01 * state.C)
        return (h * jnp.nan if wrong == "NaN" else 1.01 * h), state

    assert chosen() == "chunkwise"
    replace(monkeypatch, "chunkwise", compute)
    assert command.run([]) == MACHINE_FAILED
    assert "failed" in capsys.readouterr().out
    replace(monkeypatch, "chunkwise", correct)
    assert chosen() == "parallel"
    reason = verdicts.refusal("mlstm", "chunkwise")
    assert reason is not None and "failed `xlstm-jax check` on this device (1 x 24" in reason
    assert ("error inf of" in reason) == (wrong == "NaN")
    # By name it still runs.
    assert chosen("chunkwise") == "chunkwise"


def test_verdicts_do_not_apply_to_other_versions(folder, monkeypatch):
    verdicts.record({"mlstm": {"chunkwise": FAILED}})
    assert verdicts.refusal("mlstm", "chunkwise") is not None
    known = verdicts.describe()
    monkeypatch.setattr(verdicts, "describe", lambda: known | {"driver": "another"})
    verdicts._verdicts.cache_clear()
    assert verdicts.refusal("mlstm", "chunkwise") is None
    verdicts.record({"mlstm": {"chunkwise": PASSED}})
    assert len(json.loads((folder / verdicts.FILE).read_text())) == 2


def test_verdicts_do_not_apply_to_other_kernels(tmp_path, monkeypatch):
    digests = []
    monkeypatch.setattr(pallas_kernels, "__path__", [str(tmp_path)])
    for text in ("a = 1", "a = 2"):
        (tmp_path / "kernel.py").write_text(text)
        digests.append(verdicts.describe()["kernels"])
    assert digests[0] != digests[1]


def test_verdicts_do_not_apply_to_a_target_of_ahead_of_time_compilation(folder):
    verdicts.record({"mlstm": {"triton": FAILED, "mosaic_gpu": PASSED | {"fastest": True}}})
    with common.compiled_for("sm_90"):
        assert verdicts.refusal("mlstm", "triton") is None
        assert verdicts.refusal("mlstm", "mosaic_gpu") is not None


def test_auto_selects_mosaic_gpu_only_if_it_was_fastest(folder):
    assert "passed `xlstm-jax check` and is faster than 'triton'" in (
        verdicts.refusal("mlstm", "mosaic_gpu") or ""
    )
    verdicts.record({"mlstm": {"mosaic_gpu": PASSED}})
    assert verdicts.refusal("mlstm", "mosaic_gpu") is not None
    verdicts.record({"mlstm": {"mosaic_gpu": PASSED | {"fastest": True}}})
    assert verdicts.refusal("mlstm", "mosaic_gpu") is None


def test_fastest_is_the_one_that_is_faster_in_every_workload():
    other = SMALL._replace(T=48)
    outcomes = [
        Outcome(name, workload, 0.0, "h", time)
        for name, times in {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (0.5, 3.0)}.items()
        for workload, time in zip((SMALL, other), times, strict=True)
    ]
    result = device_check.verdicts(outcomes)["mlstm"]
    assert {name: x["fastest"] for name, x in result.items()} == dict.fromkeys("abc", False)
    result = device_check.verdicts([one for one in outcomes if one.implementation != "c"])["mlstm"]
    assert result["a"]["fastest"] and not result["b"]["fastest"]
    # A wrong implementation is not compared, however fast it is.
    wrong = [
        one._replace(error=1.0, milliseconds=0.5) if one.implementation == "c" else one
        for one in outcomes
    ]
    result = device_check.verdicts(wrong)["mlstm"]
    assert result["a"]["fastest"] and not result["c"]["passed"] and not result["c"]["fastest"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_corrupt_file_is_ignored(folder, text):
    folder.mkdir()
    (folder / verdicts.FILE).write_text(text)
    assert verdicts.refusal("mlstm", "chunkwise") is None


def test_json_has_device_and_outcomes(folder, small, unchecked_types, capsys):
    assert command.run(["--json", "--no-record"]) == DONE
    result = json.loads(capsys.readouterr().out)
    assert result["device"]["jax"] == jax.__version__
    assert {one["implementation"] for one in result["outcomes"]} == {"chunkwise", "parallel"}
    assert all(one["passed"] and one["error"] < 1e-4 for one in result["outcomes"])
    assert not folder.exists()


def test_h_the_state_and_all_gradients_are_compared(unchecked_types):
    with_state, without = (
        jax.jit(functools.partial(device_check._evaluate, workload, "recurrent"))(
            *device_check._arguments(workload)
        )
        for workload in (SMALL, SMALL._replace(with_state=False))
    )
    assert with_state.keys() == {"h", "C", "n", *(f"gradient {i}" for i in range(5))}
    for name in ("h", "C", "n"):
        np.testing.assert_array_equal(with_state[name], without[name])
    # The loss depends on the state only if the workload says so.
    assert jnp.abs(with_state["gradient 1"] - without["gradient 1"]).max() > 0.01


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_sequence_is_reset(platform):
    for workload in device_check.workloads(platform):
        _, reset, _ = device_check._arguments(workload)
        assert reset[:, 1:].any(axis=1).all(), workload


def test_results_are_printed_also_if_they_cannot_be_stored(folder, small, unchecked_types, capsys):
    folder.write_text("a file")
    with pytest.raises(OSError):
        command.run([])
    assert "passed" in capsys.readouterr().out


def test_every_platform_has_padded_and_full_tiles_in_both_dtypes():
    for platform in ("cpu", "gpu", "tpu"):
        workloads = device_check.workloads(platform)
        for op in ("mlstm", "slstm"):
            mine = [one for one in workloads if one.op == op]
            assert {one.dtype for one in mine} == {"float32", "bfloat16"}
            assert any(one.K % 64 for one in mine) and any(one.K % 64 == 0 for one in mine)


def test_a_gpu_is_checked_with_a_sequence_that_is_split_into_segments():
    long = [one for one in device_check.workloads("gpu") if not one.with_state]
    assert len(long) == 1
    programs = long[0].B * long[0].H  # a head of (64, 128) is one block of the state
    for chip in ("sm_80", "sm_90", "sm_100"):
        count = ARCHITECTURES[chip].multiprocessors
        assert segments.segment_length(long[0].T, programs, count) < long[0].T
