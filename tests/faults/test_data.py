"""Data that change, vanish or are not numbers, and a worker process that dies."""

import functools
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.faults.conftest import Try
from xlstm_jax.data.prepare import PrepareConfig, prepare

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def tokens(text, tmp_path_factory):
    """The text as prepared tokens."""
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    prepare(PrepareConfig(source=str(text)), folder, num_workers=1)
    return folder


def shard(folder):
    return folder / "train" / "00000.bin"


def remove(folder):
    shard(folder).unlink()


def truncate(folder):
    os.truncate(shard(folder), shard(folder).stat().st_size // 2)


def alter(folder):
    tokens = np.fromfile(shard(folder), np.uint16)
    tokens[100] ^= 1
    tokens.tofile(shard(folder))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "damage", [slow(remove), slow(truncate), alter], ids=["removed", "short", "altered"]
)
def test_a_damaged_shard_is_one_line_and_its_return_resumes(
    make_run, tokens, tmp_path, tries, damage
):
    folder = shutil.copytree(tokens, tmp_path / "tokens")
    run = make_run(dict(source=str(folder), verify="full"), steps=30)
    child = run.start()
    child.wait_for("step", 20)
    child.kill()
    child.finish()
    lost = child.steps - run.saved
    damage(folder)
    line = run.fails(2)
    shutil.rmtree(folder)
    shutil.copytree(tokens, folder)
    run.to_end()
    tries.append(Try("shard of data", damage.__name__, "exit 2, one line; resumed", lost))
    assert shard(folder).name in line


def test_one_batch_of_nan_is_skipped_and_four_end_the_run_with_a_dump_that_replays(
    make_run, unbroken, tries
):
    run = make_run()
    run.to_end(nan_batches=[12])
    skipped = [record["skipped"] for record in run.records() if "skipped" in record]
    assert sum(skipped) == 1
    tries.append(Try("NaN batch", "one", "skipped"))
    run = make_run(max_consecutive_skips=4)
    # Between two checkpoints: one that is saved meanwhile would count the first ones as skipped.
    line = run.fails(3, "replay", nan_batches=[*range(22, 26)])
    assert "from step 22 on" in line
    assert run.command("replay", str(run.run_dir / "diverged.json"), nan_batches=[22])[0] == 0
    tries.append(Try("NaN batch", "four in a row", "exit 3, one line; replayed"))
    run.to_end()  # the same batches without NaN
    assert run.records() == unbroken.records()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_around_a_rewind_repeats_it(make_run, tries, seed):
    options, nan_batches = dict(spike_rewinds=1), [*range(17, 25)]
    unbroken, run, rng = make_run(**options), make_run(**options), random.Random(seed)
    assert "the run returns to step 14" in unbroken.to_end(nan_batches=nan_batches)[0]
    rewound = 17 + 8  # steps until the rewind, at least
    child = run.start(nan_batches=nan_batches)
    child.wait_for("step", rewound + rng.randrange(-2, 12))
    child.kill()
    child.finish()
    lost = max(child.phases[-1][1] - run.saved, 0)
    run.to_end(nan_batches=nan_batches)
    assert run.records() == unbroken.records()
    tries.append(Try("SIGKILL around a rewind", "step", "resumed, equal", lost, seed))


def children_of(pid):
    """The child processes that any thread of a process started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def is_worker(pid):
    return b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_a_killed_worker_of_the_data_is_one_line_and_the_run_resumes(
    make_run, unbroken, tries, number
):
    run = make_run(dict(workers=1))
    child = run.start()
    child.wait_for("step", 15)
    (worker,) = filter(is_worker, children_of(child.process.pid))
    os.kill(worker, number)
    code, errors = child.finish(120)
    assert code == 4 and len(errors) == 1, (code, errors)
    lost = child.steps - run.saved
    run.to_end()
    assert run.records() == unbroken.records()
    tries.append(Try("data worker killed", number.name, "exit 4, one line; resumed, equal", lost))
