"""Writers of services and of users: what they receive, and that they never end a run."""

import struct
import sys
import types
from typing import Any

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.train import fit, rundir
from xlstm_jax.train.writers import check_services, open_service

RECORD = {
    "loss": 1.5,
    "grad_norm": None,
    "gates": {"0m": {"forget_mean": [0.5, 0.7, None, float("inf")]}},
    "mine_text": "once",
}


class Recorder:
    """A writer, or a run of a service, that keeps what it receives."""

    def __init__(self):
        self.records, self.closed = [], 0

    def write(self, step, metrics):
        self.records.append((step, metrics))

    def log(self, metrics, step):
        self.records.append((step, metrics))

    def close(self):
        self.closed += 1

    finish = close


@pytest.fixture
def service(monkeypatch):
    """Stands in for the packages wandb and trackio."""
    module = types.ModuleType("service")
    module.calls, module.run = [], Recorder()
    module.init = lambda **options: module.calls.append(options) or module.run
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return module


@pytest.fixture
def tiny(tiny_lm, experiment):
    return experiment(steps=2, eval_every=0, log_every=1, checkpoint_every=1)


def events(folder):
    """The events of TensorBoard files: their length, its checksum, the data, their checksum."""
    from tensorboardX.proto import event_pb2

    event: Any = event_pb2
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield event.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_gets_scalars_histograms_and_text(tmp_path):
    options: dict[str, Any] = dict(run_name="tiny", run_id="1", config={})
    for step in (0, 7):
        writer = open_service("tensorboard", tmp_path, **options, step=step)
        writer.write(step + 1, RECORD)
        writer.close()
    written = list(events(tmp_path / "tensorboard"))
    values = {v.tag: v for event in written for v in event.summary.value}
    assert values["loss"].simple_value == pytest.approx(1.5) and "grad_norm" not in values
    histogram = values["gates/0m/forget_mean"].histo
    assert (histogram.num, histogram.sum) == (2, pytest.approx(1.2))
    assert any("once" in str(v.tensor) for tag, v in values.items() if "mine_text" in tag)
    # The second writer continues a run that was saved at step 7: later events are purged.
    assert [e.step for e in written if e.session_log.status == e.session_log.START] == [8]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_numbers_and_continue_the_same_run(service, tmp_path, tiny, with_train, name):
    cfg = with_train(tiny, writers=(name,), steps=1, schedule="constant", warmup_steps=1)
    fit(cfg, tmp_path / "run")
    fit(with_train(cfg, steps=2), tmp_path / "run")
    steps = [step for step, _ in service.run.records]
    assert steps == [1, 2] and service.run.closed == 2
    assert service.run.records[0][1]["loss"] > 0
    first, second = service.calls
    key = "id" if name == "wandb" else "name"
    assert first[key] == second[key] and first["resume"] == "allow"
    assert rundir.read_json(tmp_path / "run" / "run.json")["tracker_id"] in first[key]
    assert rundir.tracker_id(tmp_path / "run", fresh=True) not in first[key]
    writer = open_service(name, tmp_path, run_name="a", run_id="1", config={}, step=0)
    writer.write(3, RECORD)
    assert service.run.records[-1] == (3, {"loss": 1.5, "gates/0m/forget_mean": 0.6})


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_an_error_before_anything_is_written(
    tmp_path, tiny, with_train, monkeypatch, name
):
    module = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {module}, .*jax\[{name}\]'"):
        fit(with_train(tiny, writers=(name,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wandb_needs_a_key_unless_it_is_offline(service, monkeypatch, tmp_path):
    check_services(["wandb"])
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="needs an API key, but WANDB_API_KEY is not set"):
        check_services(["wandb"])
    (tmp_path / ".netrc").write_text("machine other.org login user password secret\n")
    with pytest.raises(ConfigError, match="API key"):
        check_services(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_services(["wandb"])
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    check_services(["wandb"])


def test_a_writer_that_fails_is_logged_once_and_dropped(tmp_path, tiny, caplog):
    broken, working = Recorder(), Recorder()

    def fail(step, metrics):
        raise OSError("no\nnetwork")

    broken.write = fail
    assert fit(tiny, tmp_path / "run", writers=[broken, working]).finished
    assert caplog.messages == [
        "Recorder failed at step 1 (OSError: no network) and is closed; the run continues "
        "without it."
    ]
    assert [step for step, _ in working.records] == [1, 2]
    assert (broken.closed, working.closed) == (1, 1)


def test_a_service_that_cannot_be_opened_does_not_end_the_run(
    service, tmp_path, tiny, with_train, monkeypatch, caplog
):
    def fail(**_):
        raise ConnectionError("offline")

    monkeypatch.setattr(service, "init", fail)
    assert fit(with_train(tiny, writers=("wandb",)), tmp_path / "run").finished
    assert "opening the writer 'wandb' failed (ConnectionError: offline)" in caplog.messages[0]


def test_an_interrupt_in_a_writer_ends_the_run(tmp_path, tiny):
    writer = Recorder()

    def interrupt(step, metrics):
        raise KeyboardInterrupt

    writer.write = interrupt
    with pytest.raises(KeyboardInterrupt):
        fit(tiny, tmp_path / "run", writers=[writer])
    assert writer.closed == 1


def test_an_object_that_is_no_writer_is_rejected(tmp_path, tiny, unchecked_types):
    nothing: Any = print
    with pytest.raises(ConfigError, match=r"writers must have the methods write\(step, metrics\)"):
        fit(tiny, tmp_path / "run", writers=[nothing])
