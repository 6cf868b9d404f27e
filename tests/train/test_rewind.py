"""Rewinds after spikes: the run returns to a checkpoint, leaves out data, and repeats exactly."""

import dataclasses

import numpy as np
import pytest

from tests.train.test_dump import poisoned
from tests.train.test_loop import CrashError, crash_at, interrupt_at, records
from xlstm_jax.config import ConfigError
from xlstm_jax.data import loader
from xlstm_jax.data.batch_sizes import BatchSizes
from xlstm_jax.data.stream import Stream
from xlstm_jax.train import DivergedError, checkpoint, fit, replay
from xlstm_jax.train.batches import GivenBatches

LIMIT = 3


@pytest.fixture(scope="module")
def spiky(tiny_lm, experiment):
    """A config, and data with NaN in the steps 8 to 10; checkpoints at 5, 10, ... as well as 0."""
    cfg = experiment(steps=16, max_consecutive_skips=LIMIT, spike_rewinds=1, keep=9)
    return cfg, poisoned(cfg, range(8, 8 + LIMIT))


@pytest.fixture(scope="module")
def rewound(spiky, tmp_path_factory):
    cfg, data = spiky
    run_dir = tmp_path_factory.mktemp("rewound") / "run"
    return fit(cfg, run_dir, data=data), run_dir


def test_a_run_returns_to_the_checkpoint_before_a_spike_and_leaves_out_its_data(
    spiky, rewound, tmp_path, assert_same
):
    cfg, data = spiky
    result, run_dir = rewound
    assert result.finished and int(result.state.guard.skipped) == 0
    # The same run with data that never had the spike: steps 5 to 10 are left out.
    other = fit(cfg, tmp_path / "other", data=data[:5] + data[11:])
    assert_same(result.state.params, other.state.params)
    assert_same(result.state.opt_state, other.state.opt_state)
    assert records(run_dir) == records(tmp_path / "other")
    assert checkpoint.steps(run_dir) == [0, 5, 10, 15, 16]


@pytest.mark.parametrize(
    "callback",
    [
        crash_at(12),
        interrupt_at(9),
        pytest.param(crash_at(6), marks=pytest.mark.slow),
        pytest.param(interrupt_at(6), marks=pytest.mark.slow),
    ],
)
def test_a_rewound_run_that_is_interrupted_resumes_bit_exactly(
    spiky, rewound, tmp_path, assert_same, callback
):
    cfg, data = spiky
    for _ in range(3):  # `callback` may fire before and after the rewind
        try:
            result = fit(cfg, tmp_path / "run", data=data, on_metrics=callback)
        except CrashError:
            continue
        if result.finished:
            break
    result = fit(cfg, tmp_path / "run", data=data)
    assert_same(result.state.params, rewound[0].state.params)
    assert records(tmp_path / "run") == records(rewound[1])


def test_the_spike_stays_in_the_dump(rewound):
    result = replay.replay(rewound[1] / "diverged.json")
    assert result.reproduced and result.dump.first_skipped_step == 8


@pytest.mark.slow
def test_a_second_spike_is_left_out_as_well_and_a_third_one_ends_the_run(spiky, tmp_path, caplog):
    cfg, data = spiky
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, spike_rewinds=2))
    spikes = [*range(8, 11), *range(13, 16)]
    assert fit(cfg, tmp_path / "two", data=poisoned(cfg, spikes)).finished
    lines = [line for line in caplog.messages if "the run returns to" in line]
    # Batch 13 is that of step 7 after the first rewind, which left out six.
    assert [line.split(":")[0] for line in lines] == [
        "a spike ended at step 11", "a spike ended at step 10",
    ]  # fmt: skip
    with pytest.raises(DivergedError):
        fit(cfg, tmp_path / "three", data=poisoned(cfg, [*spikes, *range(19, 22)]))


@pytest.mark.slow
def test_a_spike_in_the_first_steps_returns_to_step_0(spiky, tmp_path, assert_same):
    cfg, data = spiky
    result = fit(cfg, tmp_path / "a", data=poisoned(cfg, range(LIMIT)))
    other = fit(cfg, tmp_path / "b", data=poisoned(cfg, ())[LIMIT:])
    assert_same(result.state.params, other.state.params)


@pytest.mark.slow
def test_the_data_of_a_config_are_left_out_in_a_rewound_run(
    tiny_lm, experiment, tmp_path, monkeypatch
):
    """A checkpoint of step 5, and a spike in steps 8 to 10: step 5 gets the batch of step 11."""
    cfg = experiment(steps=16, max_consecutive_skips=LIMIT, spike_rewinds=1)
    make, loaded = Stream.batch, []

    def batch(self, step, **hosts):
        made = make(self, step, **hosts)
        loaded.append((step, self.skips, made.index.tolist()))
        is_spike = 8 <= step <= 10 and not self.skips
        return made._replace(weights=made.weights * np.float32(np.nan)) if is_spike else made

    monkeypatch.setattr(Stream, "batch", batch)
    assert fit(cfg, tmp_path / "run").finished
    after = [index for step, skips, index in loaded if step == 5 and skips == ((5, 11),)]
    assert after[0] == loader.batch_at(loader.load(cfg.data, "train"), cfg.data, 11).index.tolist()


@pytest.mark.parametrize("packing", ["windows", "stream"])
def test_skips_move_the_data_by_full_steps(experiment, packing):
    cfg = experiment(data=dict(packing=packing)).data
    examples = loader.load(cfg, "train")
    plain = Stream(examples, cfg, BatchSizes(cfg.batch_size))
    stream = plain.skip([(5, 11), (7, 10)])
    for step, other in ((4, 4), (5, 11), (6, 12), (7, 16), (30, 39)):
        assert stream.index_of(step) == plain.index_of(other), step


def test_skips_within_a_ramp_count_sequences(experiment):
    cfg = experiment().data
    sizes = BatchSizes(cfg.batch_size, ((0, 0.25), (6, 0.5), (10, 1.0)))
    plain = Stream(loader.load(cfg, "train"), cfg, sizes)
    stream = plain.skip([(4, 8)])
    # Steps 4 to 7 have 1, 1, 2 and 2 sequences: after them the data continue without a gap.
    following = sum((plain.index_of(step) for step in range(8, 14)), [])
    moved = sum((stream.index_of(step) for step in range(4, 10)), [])
    assert moved == following[: len(moved)]


def test_data_that_can_be_read_once_cannot_be_rewound(spiky):
    cfg, data = spiky
    with pytest.raises(ConfigError, match="spike_rewinds=1 must be 0 with data that can be read"):
        GivenBatches(iter(data), cfg)


def test_data_without_enough_batches_after_skips_name_the_steps_of_the_config(spiky):
    cfg, data = spiky
    steps = cfg.train.steps
    given = GivenBatches(list(data)[:steps], cfg, [(2, 4)])
    message = f"each of train.steps={steps} and 2 skipped ones, but it ends after {steps};"
    with given.batches(4, steps - 4, host_index=0, host_count=1) as batches:
        with pytest.raises(ConfigError, match=message):
            list(batches)
