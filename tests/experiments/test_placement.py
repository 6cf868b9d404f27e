"""Positions of sLSTM blocks: patterns, selection of parameters, and the smallest grid."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import placement
from xlstm_jax.modules import LM
from xlstm_jax.train.losses import token_sums


def test_all_patterns_of_four_blocks_and_some_of_eight():
    four, eight = placement.patterns(4), placement.patterns(8)
    assert len(set(four)) == 16 and four[0] == "mmmm" and four[-1] == "ssss"
    counts = [pattern.count("s") for pattern in four]
    assert counts == sorted(counts)
    assert len(set(eight)) == len(eight) == 12
    assert {pattern.count("s") for pattern in eight} == {0, 1, 4, 8}


def test_every_member_differs_in_pattern_rate_or_seed():
    members = placement.members_of("cpu")
    assert len(set(members)) == len(members) == 16 * 2 * 2


def test_the_parameters_of_a_pattern_are_the_blocks_that_its_flags_select():
    tree = {
        "head": np.zeros(3),
        "stack": {letter: {"kernel": np.arange(4) + n} for n, letter in ((0, "m"), (10, "s"))},
    }
    chosen = placement.params_of(tree, "msms")
    np.testing.assert_array_equal(chosen["stack"]["m"]["kernel"], [0, 2])
    np.testing.assert_array_equal(chosen["stack"]["s"]["kernel"], [11, 13])
    assert chosen["head"] is tree["head"]
    assert set(placement.params_of(tree, "mmmm")["stack"]) == {"m"}


def test_records_are_the_means_of_the_seeds_at_the_better_rate():
    rates = (1e-3, 1e-2)
    members = [placement.Member("ms", lr, seed) for lr in rates for seed in (0, 1)]
    bits = np.array([3.0, 3.2, 2.0, 2.4])
    (record,) = placement.summarize(placement.CPU.model, members, bits)
    assert record["bits_per_byte"] == {"0.001": [3.0, 3.2], "0.01": [2.0, 2.4]}
    assert record["best_lr"] == "0.01" and record["best"] == pytest.approx(2.2)
    good = placement.outcome("cpu", [record], 1e-6)
    bad = placement.outcome("cpu", [record | {"best": placement.LEVEL}], 1e-3)
    assert list(good.values()) == [True, True] and list(bad.values()) == [False, False]


@pytest.mark.slow
def test_flags_select_the_blocks_of_a_plain_model():
    cfg = dataclasses.replace(placement.SMOKE.model, pattern="ms")
    params = placement.init_params(cfg, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, next(placement.valid_batches(placement.SMOKE)))
    loss_fn = jax.jit(placement.make_loss_fn(cfg))

    def loss_of(pattern):
        flags = jnp.asarray(placement.flags_of(pattern))
        return float(loss_fn(params | {placement.FLAGS: flags}, batch, None)[0])

    plain = jax.jit(functools.partial(token_sums, LM(cfg), document_resets=True))
    expected, _ = plain(placement.params_of(params, cfg.pattern), batch)
    assert loss_of("ms") == pytest.approx(float(expected.ce_sum), rel=1e-5)
    assert loss_of("sm") != pytest.approx(float(expected.ce_sum), rel=1e-4)


@pytest.mark.slow
def test_the_smallest_grid_writes_a_result_and_a_plot(tmp_path, monkeypatch, one_device):
    model = dataclasses.replace(placement.SMOKE.model, pattern="s")  # less to compile
    monkeypatch.setitem(placement.SIZES, "smoke", dataclasses.replace(placement.SMOKE, model=model))
    monkeypatch.setattr(placement, "separate_program", lambda *args: {})
    assert placement.main(placement.Options(size="smoke", out=tmp_path / "p.json")) == 0
    result = json.loads((tmp_path / "p.json").read_text())
    assert [one["pattern"] for one in result["patterns"]] == ["m", "s"]
    assert result["outcome"]["a member has the loss of an LM with its pattern"]
    assert 0 < (tmp_path / "p.png").stat().st_size < 300 * 1024
