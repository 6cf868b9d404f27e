"""The large architecture and `transformers` checkpoints against golden vectors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files
from tests.convert import published
from tests.golden_files import FOLDER, assert_all_match, assert_matches
from xlstm_jax import convert
from xlstm_jax.convert import large, large_fields, mapping, names
from xlstm_jax.convert.fields import Fields
from xlstm_jax.convert.tensors import from_arrays
from xlstm_jax.generate import generate
from xlstm_jax.modules import LM, Backbone

LARGE = ["xlstm_large_small", "xlstm_large_bias_capped"]
HF = ["hf_tiny", "hf_tiny_sharded"]

every_large = pytest.mark.parametrize("name", LARGE)
every_model = pytest.mark.parametrize("name", LARGE + HF)


def _load_large(name):
    golden = golden_files.load(name)
    fields = Fields(golden.config, "the config")
    cfg = large_fields.lm_config(
        fields,
        dim=fields.count("embedding_dim"),
        num_blocks=fields.count("num_blocks"),
        factor=large.FFN_FACTOR,
        dtype="float32",
    )
    return golden, cfg, mapping.load(cfg, names.LARGE, from_arrays(golden.under("param/")))


def _load(name):
    """The golden vectors, config and parameters of a model."""
    if name in LARGE:
        return _load_large(name)
    return golden_files.load(f"{name}_io"), *convert.load_hf(FOLDER / name)


def _apply(cfg, params, ids, state=None):
    return jax.jit(LM(cfg).apply)({"params": params}, jnp.asarray(ids), state)


def _assert_states_match(state, expected, tolerance):
    blocks = sorted({key.split("/")[0] for key in expected})
    assert len(blocks) == state["M"].m.shape[0]
    for block in blocks:
        actual = jax.tree.map(lambda leaf, block=block: leaf[int(block)], state["M"])
        c, n, m = (expected[f"{block}/{leaf}"] for leaf in "cnm")
        published.assert_same_mlstm_state(actual, c, n, m, tolerance)


@every_model
def test_logits_and_states_match(name):
    golden, cfg, params = _load(name)
    logits, state = _apply(cfg, params, golden.arrays["input/ids"])
    tolerance = published.VALUES["float32"]
    assert_matches(logits, golden.arrays["output/logits"], tolerance, "logits")
    _assert_states_match(state, golden.under("state/"), tolerance)


@every_model
def test_logits_and_states_match_step_by_step(name):
    golden, cfg, params = _load(name)
    ids, step_logits = jnp.asarray(golden.arrays["input/ids"]), []
    step = jax.jit(LM(cfg).apply)
    state = LM(cfg).init_state(ids.shape[0])
    for t in range(ids.shape[1]):
        logits, state = step({"params": params}, ids[:, t : t + 1], state)
        step_logits.append(logits)
    tolerance = published.VALUES["float32"]
    logits = np.concatenate(step_logits, axis=1)
    assert_matches(logits, golden.arrays["output/logits_step"], tolerance, "logits")
    _assert_states_match(state, golden.under("state/"), tolerance)


@pytest.mark.parametrize(
    "name, lengths",
    [
        (LARGE[0], slice(None)),
        # The second model takes the same code path, so one length suffices.
        (LARGE[1], slice(-1, None)),
        pytest.param(LARGE[1], slice(-1), marks=pytest.mark.slow),
    ],
)
def test_prefill_matches_for_every_length(name, lengths):
    golden, cfg, params = _load_large(name)
    for length in golden.config["prefill_lengths"][lengths]:
        ids = golden.arrays["input/ids"][:, :length]
        logits, state = _apply(cfg, params, ids)
        expected = golden.arrays[f"output/logits_last_prefill_{length}"]
        assert_matches(logits[:, -1], expected, published.VALUES["float32"], f"{length} tokens")
        expected_states = golden.under(f"state_prefill_{length}/")
        _assert_states_match(state, expected_states, published.VALUES["float32"])


@every_model
def test_residual_stream_matches_after_every_block(name):
    golden, cfg, params = _load(name)
    if name in LARGE:
        stream = [golden.arrays["output/embedding"]]
        stream += [golden.arrays[f"output/block_{n}"] for n in range(cfg.num_blocks)]
    else:  # transformers stores its last hidden state after the final norm
        stream = [golden.arrays[f"output/hidden_states_{n}"] for n in range(cfg.num_blocks)]
    x = jnp.asarray(params["token_embedding"]["embedding"])[golden.arrays["input/ids"]]
    apply = jax.jit(Backbone(dataclasses.replace(cfg, pattern="M", final_norm="none")).apply)
    for number, expected in enumerate(stream):
        if number:
            block = jax.tree.map(lambda leaf, n=number: leaf[n - 1 : n], params["stack"])
            x, _ = apply({"params": {"stack": block}}, x)
        assert_matches(x, expected, published.VALUES["float32"], f"after {number} blocks")


def _loss_and_logits(golden, cfg, params):
    length = int(golden.arrays["input/train_len"])
    ids = jnp.asarray(golden.arrays["input/ids"][:, :length])
    labels = jnp.asarray(golden.arrays["input/labels"][:, :length])
    logits, _ = LM(cfg).apply({"params": params}, ids)
    return published.mean_cross_entropy(logits, labels), logits


def _assert_loss_and_logits_match(golden, loss, logits, tolerance):
    assert_matches(logits, golden.arrays["output64/train_logits"], tolerance, "logits")
    assert_matches(np.asarray(loss), golden.arrays["output64/train_loss"], tolerance, "loss")


@every_large
def test_training_logits_and_loss_match_in_float64(name, x64):
    golden, cfg, params = _load_large(name)
    params = published.cast(params, "float64")
    loss, logits = jax.jit(lambda p: _loss_and_logits(golden, cfg, p))(params)
    _assert_loss_and_logits_match(golden, loss, logits, published.VALUES["float64"])


@every_large
def test_training_logits_loss_and_gradients_match(name):
    golden, cfg, params = _load_large(name)
    loss_and_grads = jax.value_and_grad(lambda p: _loss_and_logits(golden, cfg, p), has_aux=True)
    (loss, logits), grads = jax.jit(loss_and_grads)(params)
    _assert_loss_and_logits_match(golden, loss, logits, published.VALUES["float32"])
    actual = dict(mapping.export(cfg, names.LARGE, grads))
    assert_all_match(actual, golden.under("grad/param/"), published.GRADIENTS["float32"])


# hf_tiny_sharded differs from hf_tiny only in how it is loaded.
@pytest.mark.parametrize("name", [*LARGE, HF[0], pytest.param(HF[1], marks=pytest.mark.slow)])
def test_greedy_sequences_match_token_for_token(name):
    golden, cfg, params = _load(name)
    if name in LARGE:
        prompts = golden.arrays["input/ids"][:, : int(golden.arrays["input/greedy_prompt_len"])]
        expected = golden.arrays["output/greedy_tokens"]
    else:
        length = int(golden.arrays["input/prefill_len"])
        prompts = golden.arrays["input/ids"][:, :length]
        expected = golden.arrays["output/greedy_sequence"][:, length:]
    generation = generate(
        LM(cfg), {"params": params}, prompts.tolist(), max_new_tokens=expected.shape[1]
    )
    assert generation.tokens == expected.tolist()


@pytest.mark.parametrize("name", HF)
def test_next_token_loss_matches(name):
    golden, cfg, params = _load(name)
    ids = jnp.asarray(golden.arrays["input/ids"])
    logits, _ = _apply(cfg, params, ids)
    loss = published.mean_cross_entropy(logits[:, :-1], ids[:, 1:])
    expected = golden.arrays["output/loss_shifted"]
    assert_matches(np.asarray(loss), expected, published.VALUES["float32"], "loss")


def test_load_large_reads_the_parameters_of_the_golden_file():
    _, cfg, params = _load_large("xlstm_large_small")
    loaded_cfg, loaded = convert.load_large(FOLDER / "xlstm_large_plain_checkpoint")
    assert loaded_cfg == cfg
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, params))


def test_fused_and_separate_weights_load_alike():
    golden, cfg, params = _load_large("xlstm_large_small")
    tensors, fused = golden.under("param/"), golden.under("fused/")
    for index in range(cfg.num_blocks):
        block = names.LARGE_BLOCK.format(index)
        for fused_name, parts in names.FUSED.items():
            for kind in (".weight", ".bias"):
                arrays = [tensors.pop(block + p + kind, None) for p in parts]
                arrays = [array for array in arrays if array is not None]
                # Only the gates have biases in this model.
                if arrays:
                    name = block + fused_name + kind
                    tensors[name] = np.concatenate(arrays)
                    if name in fused:
                        assert np.array_equal(fused[name], tensors[name])
    loaded = mapping.load(cfg, names.LARGE, large.unfused(from_arrays(tensors), cfg))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, params))
