"""Checkpoints restore exactly; corrupt ones raise a one-line error."""

import errno
import hashlib
import json
import resource

import jax
import numpy as np
import pytest

from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.train import (
    Checkpointer,
    CheckpointError,
    TrainState,
    checkpoint,
    init_state,
    make_optimizer,
    manifest,
    restore_params,
)


@pytest.fixture
def saved(tmp_path, tiny_lm, experiment, key, tokens):
    """A run directory with checkpoints of steps 2 and 4, its config, and the saved states."""
    cfg, run_dir = experiment(), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(to_dict(cfg)))
    state = init_state(tiny_lm(cfg.model), make_optimizer(cfg.train), key, tokens)
    states = {}
    with Checkpointer(run_dir, keep=2) as saver:
        for step in (1, 2, 4):
            states[step] = jax.tree.map(lambda x, step=step: x + x.dtype.type(step), state)
            saver.save(step, states[step], {"step": step, "third": 1 / 3}, to_dict(cfg))
            saver.save(step, state, {"step": -1}, {})  # already saved: ignored
    return run_dir, cfg, states


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_restore_latest_is_bit_exact(saved, assert_same):
    run_dir, _, states = saved
    assert checkpoint.steps(run_dir) == [2, 4]  # step 1 was deleted, as keep=2
    before = contents(run_dir)
    like = jax.eval_shape(lambda: states[4])
    state, data = checkpoint.restore_latest(run_dir, like)
    assert isinstance(state, TrainState) and data == {"step": 4, "third": 1 / 3}
    assert_same(state, states[4])
    assert contents(run_dir) == before


def test_restore_params_restores_the_config_and_parameters_of_a_step(saved, assert_same):
    run_dir, cfg, states = saved
    for step, expected in ((None, 4), (2, 2)):
        restored_cfg, params = restore_params(run_dir, step)
        assert restored_cfg == cfg
        assert_same(params, states[expected].params)


def test_a_missing_checkpoint_or_run_is_an_error(tmp_path, saved):
    assert checkpoint.restore_latest(tmp_path / "none", {}) is None
    run_dir, _, _ = saved
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; use one of: 2, 4"):
        restore_params(run_dir, 3)
    with pytest.raises(ConfigError, match="none does not exist"):
        restore_params(tmp_path / "none")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "corrupt"),
    [
        ("state", truncate),
        ("state", flip),
        ("state", remove),
        ("data", truncate),
        ("data", flip),
        ("manifest.json", truncate),
    ],
)
def test_a_corrupt_file_is_named_and_no_file_changes(saved, corrupt, name):
    run_dir, _, states = saved
    folder = run_dir / "checkpoints" / "4" / name
    files = [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    corrupt(victim)
    before = contents(run_dir)
    like = jax.eval_shape(lambda: states[4])
    for restore in (
        lambda: checkpoint.restore_latest(run_dir, like),
        lambda: restore_params(run_dir),
    ):
        with pytest.raises(CheckpointError) as caught:
            restore()
        message = str(caught.value)
        assert str(victim) in message and "\n" not in message
        assert f"delete {run_dir / 'checkpoints' / '4'} to resume from step 2" in message
    assert contents(run_dir) == before


def test_if_the_only_checkpoint_is_corrupt_the_error_suggests_fresh(saved):
    run_dir, _, states = saved
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "2").rename(run_dir / "moved")
    truncate(checkpoints / "4" / "data" / "data.json")
    with pytest.raises(CheckpointError, match=r"must have \d+ bytes, got \d+.*--fresh"):
        checkpoint.restore_latest(run_dir, jax.eval_shape(lambda: states[4]))


def test_a_state_of_another_model_is_an_error_that_names_the_first_leaf(saved):
    run_dir, _, states = saved
    like = jax.eval_shape(lambda: states[4])
    table = like.params["token_embedding"]["embedding"]
    for params, words in (
        (
            {"else": jax.ShapeDtypeStruct((3,), np.float32)},
            "params/else is absent in the checkpoint and .3,.",
        ),
        (
            like.params | {"token_embedding": {"embedding": table.update(shape=(9, 4))}},
            r"embedding is .257, 8. in the checkpoint and .9, 4. in the config",
        ),
        (
            {name: x for name, x in like.params.items() if name != "lm_head"},
            r"params/lm_head/kernel is .8, 257. in the checkpoint and absent in the config",
        ),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.restore_latest(run_dir, like.replace(params=params))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "contents",
    ["[]", "5", "null", '"x"', '{"state/a": 3}', '{"format": 2}', '{"format": 2, "files": []}']
    + ["[" * 100_000, "\xff"],
    ids=range(9),
)
def test_a_damaged_manifest_is_a_one_line_error(saved, contents):
    run_dir, _, _ = saved
    (run_dir / "checkpoints" / "4" / "manifest.json").write_text(contents, encoding="latin-1")
    with pytest.raises(CheckpointError, match="manifest.json must list .* it is damaged; delete"):
        restore_params(run_dir)


def test_a_checkpoint_of_a_newer_version_is_refused_with_the_advice_to_upgrade(saved):
    run_dir, _, _ = saved
    path = run_dir / "checkpoints" / "4" / "manifest.json"
    path.write_text(json.dumps({"format": 3, "records": "of a later version"}))
    with pytest.raises(CheckpointError, match="format up to 2, got 3.*; upgrade xlstm-jax.$"):
        restore_params(run_dir)
    path.write_text(json.dumps(json.loads('{"data/data.json": {"size": 1, "crc32": 2}}')))
    with pytest.raises(CheckpointError, match="must have 1 bytes"):  # the format of old manifests
        restore_params(run_dir)


def test_incomplete_checkpoints_are_ignored_and_deleted_by_the_next_run(saved, caplog):
    run_dir, cfg, _ = saved
    folder = run_dir / "checkpoints"
    drafts = ["6.tmp", "6.tmp.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-12"]
    others = ["best.tmp", "6.tmp.notes"]
    for name in drafts + others:
        (folder / name / "state").mkdir(parents=True)
    assert checkpoint.steps(run_dir) == [2, 4]
    restore_params(run_dir)
    Checkpointer(run_dir).close()
    assert sorted(path.name for path in folder.iterdir()) == sorted(["2", "4", *others])
    (message,) = caplog.messages
    assert message == f"deleted incomplete checkpoints in {folder}: {', '.join(drafts)}"


def test_a_failed_write_is_an_error_of_the_system_and_keeps_the_other_checkpoints(
    saved, rng, caplog
):
    """The array store fails in its own threads; here because files may not grow beyond 256 kB."""
    run_dir, _, states = saved
    state = states[4].replace(params={"x": rng.standard_normal(200_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Checkpointer(run_dir, keep=3)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
        saver.save(6, state, {"step": 6}, {})
        with pytest.raises(OSError, match="checkpoints") as caught:
            saver.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and not caplog.messages
    assert checkpoint.steps(run_dir) == [2, 4]
    with Checkpointer(run_dir, keep=3) as saver:
        saver.save(6, state, {"step": 6}, {})
    assert checkpoint.steps(run_dir) == [2, 4, 6]


def test_the_checksum_is_of_all_bytes_of_a_large_file(tmp_path):
    """A file is read in blocks of a few MiB."""
    path = tmp_path / "array"
    path.write_bytes(bytes(9 << 20))
    manifest.write(tmp_path)
    assert manifest.verify(tmp_path) is None
    for position in (0, 5 << 20, (9 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\1")
            file.flush()
            assert "its checksum differs" in str(manifest.verify(tmp_path))
            file.seek(position)
            file.write(b"\0")


def test_parameters_alone_are_recognized_before_later_checkpoints(saved):
    run_dir, cfg, states = saved
    checkpoint.save_params(run_dir, states[2].params, to_dict(cfg))
    assert checkpoint.steps(run_dir) == [0, 2, 4]
    assert checkpoint.has_params_only(run_dir, at_most=1)
    assert not checkpoint.has_params_only(run_dir, at_most=2)
    assert not checkpoint.has_params_only(run_dir)
