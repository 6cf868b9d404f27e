"""Run directories: foreign and damaged files are never lost, and data are compared by content."""

import errno
import json
import shutil

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.train import CheckpointError, checkpoint, fit, manifest, plots, rundir
from xlstm_jax.train.writers import CallbackWriter, JsonlWriter


@pytest.fixture(scope="module")
def original(tiny_lm, experiment, tmp_path_factory):
    """A config whose steps can be extended, and its run of four steps."""
    cfg = experiment(
        steps=4, eval_every=0, checkpoint_every=2, log_every=1, schedule="constant", warmup_steps=1
    )
    run_dir = tmp_path_factory.mktemp("original") / "run"
    fit(cfg, run_dir)
    return cfg, run_dir


@pytest.fixture
def trained(original, tmp_path):
    shutil.copytree(original[1], tmp_path / "run")
    return original[0], tmp_path / "run"


def steps(run_dir):
    return [record["step"] for record in rundir.read_metrics(run_dir / rundir.METRICS)]


def test_fresh_refuses_a_folder_of_another_program(tiny_lm, experiment, tmp_path):
    foreign = {
        "checkpoints/model.pt": "weights",
        "config.json": '{"mine": 1}',
        "metrics.jsonl": "{}",
        "run.json": '{"name": "of another program"}',
    }
    for name, text in foreign.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    with pytest.raises(ConfigError, match="must be empty or a run .* no run.json of a run"):
        fit(experiment(), tmp_path, fresh=True)
    assert {name: (tmp_path / name).read_text() for name in foreign} == foreign
    assert {path.name for path in tmp_path.iterdir()} == {name.split("/")[0] for name in foreign}


def test_fresh_deletes_what_a_run_writes_and_nothing_else(trained):
    cfg, run_dir = trained
    mine = ["notes.txt", "checkpoints/model.pt", "checkpoints/best/weights", "process.log"]
    written = ["process_0.log", "diverged.json", "gates/2.png", "checkpoints/3.tmp/state/a"]
    written += ["tensorboard/events", "profile/plugins/a", "export/2/a", "export/4.tmp/a"]
    written += ["diverged/config.json", "diverged/checkpoints/3/state/a"]
    for name in mine + written:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("x")
    rundir.check_fresh(run_dir)
    rundir.discard(run_dir)
    assert sorted(
        str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()
    ) == sorted([*mine, "run.json"])
    shutil.rmtree(run_dir / "checkpoints")
    rundir.check_fresh(run_dir)  # so that an interrupted deletion can be repeated


BAD_LINES = [
    b'{"step": 2, "lo',
    b"\0" * 30,
    b'{"step": 1, "note": "caf\xe9"}',
    b'{"epoch": 1}',
    b'{"step": "1"}',
    b'{"step": 1.0}',
    b'{"step": true}',
    b'{"step": -1}',
    b"[1]",
    b"null",
    b"[" * 100_000,
    b'{"step": 1, "loss": ' + b"1" * 401 + b"}",
    b'{"step": ' + b"1" * 5000 + b"}",
    b'{"step": 1, "loss": NaN}',
    b'{"step": 1, "loss": 1e999}',
]


def test_lines_that_are_not_records_are_set_aside_and_the_records_stay(trained, caplog):
    cfg, run_dir = trained
    path = run_dir / rundir.METRICS
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*BAD_LINES[:5], *lines[:2], *BAD_LINES[5:], *lines[2:], b"", b""]))
    assert steps(run_dir) == [1, 2, 3, 4]
    rundir.prepare(run_dir, cfg, {}, step=3)
    assert path.read_bytes().splitlines() == lines[:3]
    assert (run_dir / rundir.BAD_METRICS).read_bytes().splitlines() == BAD_LINES
    (message,) = caplog.messages
    assert "15 lines are not records and were moved to metrics.bad.jsonl: 1, 2, 3" in message
    rundir.prepare(run_dir, cfg, {}, step=3)
    assert len(caplog.messages) == 1


def test_a_failed_write_leaves_complete_records_only(tmp_path, monkeypatch):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    file = writer._file

    class FullDisk:
        name, seek, truncate, close = file.name, file.seek, file.truncate, file.close

        def write(self, data):
            if len(data) > 8:
                return file.write(data[:8])
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(writer, "_file", FullDisk())
    with pytest.raises(OSError, match="no space") as caught:
        writer.write(2, {"loss": 1.0})
    assert str(caught.value.filename) == str(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    writer.close()


def test_a_disk_that_fills_while_saving_ends_the_run_which_then_continues(
    trained, tmp_path, monkeypatch, assert_same
):
    cfg, run_dir = trained
    expected = fit(cfg, run_dir)
    write = manifest.write

    def full(folder):
        if folder.name.startswith("4"):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder)

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        fit(cfg, tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == ["2"]
    monkeypatch.undo()
    assert_same(fit(cfg, tmp_path / "full").state, expected.state)
    assert steps(tmp_path / "full") == [1, 2, 3, 4]


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_file_of_a_run_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch, failing):
    path = tmp_path / "run.json"
    rundir.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space")

    owner = rundir.os if failing == "replace" else rundir.Path
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(owner, failing, fail)
        rundir.write_json(path, {"b": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_data_that_moved_are_recognized_by_content(
    tiny_lm, experiment, text, tmp_path, monkeypatch
):
    shutil.copytree(text, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    train = dict(steps=2, eval_every=0, checkpoint_every=0)
    fit(experiment(data={"source": "corpus"}, **train), "run")
    shutil.move("corpus", "moved")
    for source in ("./moved", "moved/", str(tmp_path / "moved")):
        rundir.check(tmp_path / "run", experiment(data={"source": source}, **train))
    assert fit(experiment(data={"source": "moved"}, **train), "run").finished
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["source"] == "moved"
    with pytest.raises(ConfigError, match="data.source: 'grammar', stored"):
        fit(experiment(data={"source": "grammar"}, **train), "run")
    (tmp_path / "moved" / "train" / "a.txt").write_text("other text\n" * 500)
    with pytest.raises(ConfigError, match="was trained on other data.*give their path as data.s"):
        fit(experiment(data={"source": "moved"}, **train), "run")


def test_a_stored_config_without_newer_fields_belongs_to_a_config_with_their_defaults(trained):
    cfg, run_dir = trained
    path = run_dir / rundir.CONFIG
    values = json.loads(path.read_text())
    del values["train"]["z_loss"], values["mesh"], values["data"]["tokenizer"]
    values["data"]["pattern"] = "*.txt"
    path.write_text(json.dumps(values))
    rundir.check(run_dir, cfg)
    values["train"]["z_loss"] = 1e-4
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="train.z_loss: 0.0, stored 0.0001"):
        rundir.check(run_dir, cfg)


@pytest.mark.parametrize("contents", [b"[]", b"5", b"null", b'"x"', b"{", b"\xff"])
def test_a_damaged_config_is_a_one_line_error(trained, contents):
    cfg, run_dir = trained
    (run_dir / rundir.CONFIG).write_bytes(contents)
    with pytest.raises(ConfigError, match="config.json") as caught:
        fit(cfg, run_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[], 5, None, {"step": 1}, {"totals": 3, "data": {}}])
def test_a_damaged_progress_is_a_one_line_error(trained, monkeypatch, values):
    cfg, run_dir = trained
    restore = checkpoint.restore_latest
    monkeypatch.setattr(
        checkpoint, "restore_latest", lambda *arguments: (restore(*arguments)[0], values)
    )
    with pytest.raises(CheckpointError, match="must be the progress of a run, but it is damaged"):
        fit(cfg, run_dir)


def test_a_tilde_in_the_run_directory_is_the_home_directory(trained, tmp_path, monkeypatch):
    cfg, _ = trained
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert fit(cfg, "~/run").finished and not (tmp_path / "~").exists()
    with pytest.raises(ConfigError, match="a user with a home directory"):
        fit(cfg, "~nobody-of-this-name/run")


@pytest.mark.parametrize("name", ["file/below", "x" * 300, "/proc/nowhere"])
def test_a_run_directory_that_cannot_exist_is_an_error_that_names_it(trained, tmp_path, name):
    cfg, _ = trained
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, OSError), match=name.split("/")[-1][:20]):
        fit(cfg, tmp_path / name)
    assert not (tmp_path / "below").exists()


def test_a_run_directory_with_a_character_of_patterns_is_refused(trained, tmp_path):
    """Orbax saves checkpoints in such a directory, but does not find their files again."""
    run_dir = tmp_path / "xlstm[1:0]" / "run"
    with pytest.raises(ConfigError, match=r"must be a path without \[, as checkpoints below it"):
        fit(trained[0], run_dir)
    assert not run_dir.exists()


@pytest.mark.parametrize("what", ["loss_curve", "close"])
def test_a_picture_or_writer_that_fails_does_not_fail_a_finished_run(
    trained, monkeypatch, caplog, what
):
    cfg, run_dir = trained

    def fail(*_):
        raise ValueError("no\nfonts")

    if what == "loss_curve":
        monkeypatch.setattr(plots, what, fail)
    else:
        monkeypatch.setattr(CallbackWriter, what, fail)
    assert fit(cfg, run_dir, on_metrics=lambda *_: None).finished
    (message,) = caplog.messages
    assert "failed (ValueError: no fonts); the run itself is not affected" in message


@pytest.mark.parametrize("title", ["a$b_{c$", r"$\frac$"])
def test_titles_are_plain_text_and_losses_that_are_not_finite_are_left_out(tmp_path, title):
    records = [{"step": step, "loss": 5.0 - step, "valid_loss": 4.0} for step in (1, 2, 3)]
    records += [{"step": 4, "valid_loss": value} for value in (float("nan"), float("inf"), "x")]
    plots.loss_curve(records, tmp_path / "loss.png", title)
    assert (tmp_path / "loss.png").stat().st_size > 1000
