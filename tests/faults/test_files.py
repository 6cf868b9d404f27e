"""Damaged files of a checkpoint, and a full disk: one line, and nothing else changes."""

import os
import random
import shutil
import subprocess

import pytest

from tests.faults.conftest import Try
from xlstm_jax import cpu
from xlstm_jax.cli import main
from xlstm_jax.train import checkpoint

pytestmark = pytest.mark.faults


def files(run):
    """The files of the newest checkpoint, one of each kind, and the kinds."""
    folder = run.run_dir / checkpoint.FOLDER / str(run.saved)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    # The names of blocks of arrays are hashes.
    kinds = {str(path.parent.relative_to(folder) / _kind(path.name)): path for path in paths}
    assert {"state/_METADATA", "data/_METADATA", "manifest.json"} - {*kinds} <= {"data/_METADATA"}
    return kinds


def _kind(name):
    return "<hash>" if len(name) == 32 else name


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path, rng):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete], ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_it_resumes(
    copy, unbroken, tries, one_device, capsys, monkeypatch, damage
):
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    kinds, rng, newest = files(copy), random.Random(0), copy.saved
    for kind, path in kinds.items():
        data = path.read_bytes()
        damage(path, rng)
        if kind == "manifest.json" and damage is delete:
            path.write_bytes(data)  # older checkpoints have none
            continue
        code = main(["train", str(copy.config), "--run-dir", str(copy.run_dir)])
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2
        assert f"to resume from step {checkpoint.steps(copy.run_dir)[-2]}" in line, (kind, line)
        tries.append(Try(f"checkpoint, {damage.__name__}", kind, "exit 2, one line"))
        path.write_bytes(data)
    damage(path, rng)
    lost = newest - checkpoint.steps(copy.run_dir)[-2]
    shutil.rmtree(copy.run_dir / checkpoint.FOLDER / str(newest))
    copy.to_end()
    assert copy.records() == unbroken.records()
    tries.append(Try(f"checkpoint, {damage.__name__}", "deleted as told", "resumed, equal", lost))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of limited size; `small_disk(kib)` resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kib, *options):
        options = ",".join([f"size={kib}k", *options])
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not resize(100):
        pytest.skip("mounting a tmpfs needs privileges that this process does not have")
    yield folder, lambda kib: resize(kib, "remount")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "kib", [700, *(pytest.param(kib, marks=pytest.mark.slow) for kib in (150, 400, 1000))]
)
def test_a_full_disk_is_one_line_and_a_run_with_more_space_resumes(
    make_run, unbroken, small_disk, tries, kib
):
    run, (folder, resize) = make_run(keep=9), small_disk
    run.run_dir = folder / "run"
    assert resize(kib)
    child = run.start()
    code, errors = child.finish()
    assert code == 4 and len(errors) == 1 and "no space left" in errors[0], errors
    lost = child.steps - run.saved
    assert resize(100_000)
    run.to_end()
    assert run.records() == unbroken.records()
    tries.append(Try("full disk", f"tmpfs of {kib} KiB", "exit 4, one line; resumed, equal", lost))


def test_a_file_that_must_not_grow_is_one_line_and_the_run_resumes(make_run, unbroken, tries):
    """A stand-in for a full disk that needs no privileges."""
    run = make_run()
    child = run.start(file_limit=2500)
    code, errors = child.finish()
    assert code == 4 and len(errors) == 1, errors
    lost = child.steps - run.saved
    run.to_end()
    assert run.records() == unbroken.records()
    tries.append(Try("full disk", "limit of a file", "exit 4, one line; resumed, equal", lost))
