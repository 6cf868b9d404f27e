"""Baselines against golden vectors of `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files
from tests.convert import published
from tests.convert.baselines import GOLDEN
from tests.golden_files import FOLDER, assert_all_match, assert_matches
from xlstm_jax import convert
from xlstm_jax.convert import families, mapping
from xlstm_jax.generate import generate
from xlstm_jax.modules import LM

VALUES, GRADIENTS = 1e-5, 5e-5
"""Largest allowed error in float32, relative to the largest value of an array."""

PROMPT, PREFIX = 7, 11  # tokens

every_baseline = pytest.mark.parametrize("name", GOLDEN.values())


@functools.cache
def _model(name):
    cfg, params = convert.load_hf(FOLDER / name)
    return cfg, params


@every_baseline
def test_logits_loss_and_gradients_match(name):
    golden, (cfg, params) = golden_files.load(f"{name}_io"), _model(name)
    ids = jnp.asarray(golden.arrays["input/ids"])

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_and_grads(params):
        logits, _ = LM(cfg).apply({"params": params}, ids)
        return published.mean_cross_entropy(logits[:, :-1], ids[:, 1:]), logits

    (loss, logits), grads = jax.jit(loss_and_grads)(params)
    assert_matches(logits, golden.arrays["output/logits"], VALUES, "logits")
    assert_matches(np.asarray(loss), golden.arrays["output/loss_shifted"], VALUES, "loss")
    family, unmet = families.of_model(cfg)
    assert family is not None and unmet is None
    actual = dict(mapping.export(cfg, family.rules, grads, family.joined(cfg)))
    expected = golden.under("grad/")
    assert actual.keys() == expected.keys()
    assert_all_match(actual, expected, GRADIENTS)


@every_baseline
def test_greedy_sequences_match_token_for_token(name):
    golden, (cfg, params) = golden_files.load(f"{name}_state"), _model(name)
    prompts, expected = np.split(golden.arrays["output/greedy_sequence"], [PROMPT], axis=1)
    generation = generate(
        LM(cfg), {"params": params}, prompts.tolist(), max_new_tokens=expected.shape[1]
    )
    assert generation.tokens == expected.tolist()


def _attention(state, expected):
    assert state.length.tolist() == [PREFIX] * 2
    for ours, theirs in (("k", "keys"), ("v", "values")):
        cache = getattr(state, ours)
        yield cache[:, :, :PREFIX], expected[theirs]
        assert not np.any(cache[:, :, PREFIX:])


def _convolution(inputs, expected):
    """The reference has the parts of one convolution, with one input more, time last."""
    stored = expected["conv_states"].transpose(0, 2, 1)[:, 1:]
    yield np.concatenate(inputs, axis=-1), stored


def _mamba(state, expected):
    yield from _convolution([state.conv], expected)
    yield state.cell.h, expected["recurrent_states"]


def _mamba2(state, expected):
    yield from _convolution(state.conv, expected)
    yield state.cell.h.swapaxes(-1, -2), expected["recurrent_states"]


def _gated_delta(state, expected):
    yield from _convolution(state.conv, expected)
    yield state.cell.S, expected["recurrent_states"]


def _rwkv4(state, expected):
    yield state.channel[:, 0], expected["channel_shift"]
    yield state.time.shift[:, 0], expected["time_shift"]
    yield from ((leaf, expected[name]) for name, leaf in state.time.cell._asdict().items())


STATES = {"a": _attention, "b": _mamba, "B": _mamba2, "d": _gated_delta, "r": _rwkv4}
"""Letter -> pairs of arrays of our state and of the reference's."""


@every_baseline
def test_states_after_a_prefix_match(name):
    ids = jnp.asarray(golden_files.load(f"{name}_io").arrays["input/ids"][:, :PREFIX])
    golden, (cfg, params) = golden_files.load(f"{name}_state"), _model(name)
    _, state = jax.jit(LM(cfg).apply)({"params": params}, ids, LM(cfg).init_state(2))
    for index, letter in enumerate(cfg.pattern):
        layer = cfg.pattern[:index].count(letter)
        ours = jax.tree.map(lambda leaf, n=layer: np.asarray(leaf[n]), state[letter])
        expected = golden.under(f"state/{index}/")
        if not expected:  # RWKV has the blocks on the last axis
            expected = {name: a[..., index] for name, a in golden.under("state/").items()}
        for number, (actual, reference) in enumerate(STATES[letter](ours, expected)):
            assert_matches(actual, reference, VALUES, f"block {index}, array {number}")
