"""First-generation stacks and language models against golden vectors of the package `xlstm`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import golden_files
from tests.convert import published
from tests.golden_files import assert_all_match, assert_matches
from xlstm_jax import convert
from xlstm_jax.convert import mapping, names
from xlstm_jax.modules import LM, Backbone
from xlstm_jax.sharding import path_name
from xlstm_jax.train import TrainConfig, decay_mask

STACKS = ["xlstm_block_stack_1_1", "xlstm_block_stack_bias"]
LMS = ["xlstm_lm_1_1", "xlstm_lm_slstm_only", "xlstm_lm_tied"]

every_stack = pytest.mark.parametrize("name", STACKS)
every_lm = pytest.mark.parametrize("name", LMS)


class Model:
    """The model of a golden file, with its parameters in `dtype`."""

    def __init__(self, name: str, dtype: str):
        self.golden = golden_files.load(name)
        config = published.nested(self.golden.config)
        self.cfg, params = convert.load_v1(config, self.golden.under("param/"))
        self.params = published.cast(params, dtype)
        self.module = (LM if name in LMS else Backbone)(self.cfg)
        ids = self.golden.arrays.get("input/ids")
        self.x = jnp.asarray(ids) if ids is not None else self._vectors(dtype)
        self.init_state = self.module.init_state(self.x.shape[0])
        sequence_state = published.without_initial_m(self.init_state)
        self.sequence_init_state = published.cast(sequence_state, dtype)

    def _vectors(self, dtype):
        return published.cast(self.golden.arrays["input/x"], dtype)

    def apply(self, params, x, state):
        return self.module.apply({"params": params}, x, state)

    def tensors(self, params):
        """Parameters or gradients under the names of the file."""
        start = "" if isinstance(self.module, LM) else names.V1_STACK
        tensors = mapping.export(self.cfg, names.V1, params)
        return {name.removeprefix(start): array for name, array in tensors}


@pytest.mark.parametrize(
    "name, dtype",
    [
        (STACKS[0], "float64"),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name, dtype in [(STACKS[1], "float64"), *((name, "float32") for name in STACKS)]
        ),
    ],
)
def test_stack_outputs_and_gradients_match(name, dtype, x64):
    model = Model(name, dtype)
    dy = published.cast(model.golden.arrays["input/dy"], dtype)

    @jax.jit
    def value_and_grads(params, x):
        y, pullback = jax.vjp(
            lambda p, x: model.apply(p, x, model.sequence_init_state)[0], params, x
        )
        return y, pullback(dy)

    y, (dparams, dx) = value_and_grads(model.params, model.x)
    assert_matches(y, model.golden.arrays["output64/y"], published.VALUES[dtype], "y")
    expected = model.golden.under("grad64/param/") | {"x": model.golden.arrays["grad64/input/x"]}
    assert_all_match(model.tensors(dparams) | {"x": dx}, expected, published.GRADIENTS[dtype])


def _loss_and_logits(model, params):
    logits, _ = model.apply(params, model.x, model.sequence_init_state)
    labels = jnp.asarray(model.golden.arrays["input/labels"])
    return published.mean_cross_entropy(logits, labels), logits


def _assert_loss_and_logits_match(model, loss, logits, tolerance):
    assert_matches(logits, model.golden.arrays["output64/logits"], tolerance, "y")
    assert_matches(np.asarray(loss), model.golden.arrays["output64/loss"], tolerance, "loss")


@every_lm
def test_logits_and_loss_match_in_float64(name, x64):
    model = Model(name, "float64")
    loss, logits = jax.jit(lambda params: _loss_and_logits(model, params))(model.params)
    _assert_loss_and_logits_match(model, loss, logits, published.VALUES["float64"])


@every_lm
def test_logits_loss_and_gradients_match(name):
    model = Model(name, "float32")
    loss_and_grads = jax.value_and_grad(lambda p: _loss_and_logits(model, p), has_aux=True)
    (loss, logits), grads = jax.jit(loss_and_grads)(model.params)
    _assert_loss_and_logits_match(model, loss, logits, published.VALUES["float32"])
    actual = model.tensors(grads)
    assert_all_match(actual, model.golden.under("grad/param/"), published.GRADIENTS["float32"])


@pytest.mark.parametrize("name", STACKS + LMS)
def test_outputs_and_final_states_match_step_by_step(name):
    model = Model(name, "float32")
    step, state, ys = jax.jit(model.apply), model.init_state, []
    for t in range(model.x.shape[1]):
        y, state = step(model.params, model.x[:, t : t + 1], state)
        ys.append(y)
    tolerance = published.VALUES["float32"]
    key = "output/logits_step" if name in LMS else "output/y_step"
    assert_matches(np.concatenate(ys, axis=1), model.golden.arrays[key], tolerance, "y")
    for index, letter in enumerate(model.cfg.pattern):
        layer = model.cfg.pattern[:index].count(letter)
        actual = jax.tree.map(lambda leaf, layer=layer: leaf[layer], state[letter])
        published.assert_same_layer_state(
            actual, model.golden.under(f"state/block_{index}/"), tolerance
        )


@every_stack
def test_initial_m_changes_outputs_by_less_than_float32_rounding(name, x64):
    """The reference starts with m = 0 in steps and without m in sequences; we start with 0.

    The difference comes from eps: it is above rounding in float64 and far below it in float32.
    """
    model = Model(name, "float64")
    y, _ = jax.jit(model.apply)(model.params, model.x, published.cast(model.init_state, "float64"))
    assert_matches(y, model.golden.arrays["output64/y"], 1e-6, "y")


@every_lm
def test_weight_decay_mask_is_that_of_the_reference(name):
    golden = golden_files.load(name)
    cfg, params = convert.load_v1(published.nested(golden.config), golden.under("param/"))
    decayed = set()
    for pattern, embedding in (
        (TrainConfig.decay_pattern, []),
        (r"(^|/)(kernel|embedding)$", ["token_embedding.weight"]),  # weight_decay_on_embedding
    ):
        mask = decay_mask(params, pattern)
        by_path = {path_name(p): m for p, m in jax.tree_util.tree_leaves_with_path(mask)}
        targets = mapping.targets(cfg, names.V1, mapping.parameters(cfg))
        decayed = {name for name, target in targets.items() if by_path[target.path]}
        assert decayed == set(golden.config["weight_decay_params"]) | set(embedding)


def _as_cuda(tensors):
    """The same sLSTM weights in the layout of the backend `cuda`."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith("_recurrent_kernel_")]:
        H, width, K = tensors[name].shape
        kernel = tensors[name].reshape(H, 4, K, K).transpose(0, 3, 1, 2)
        tensors[name] = kernel.reshape(H, K, width)
        bias = re.sub("_recurrent_kernel_$", "_bias_", name)
        tensors[bias] = tensors[bias].reshape(4, H, K).transpose(1, 0, 2).reshape(-1)
    return tensors


@every_stack
def test_vanilla_and_cuda_layouts_give_the_same_parameters(name):
    golden = golden_files.load(name)
    config, tensors = published.nested(golden.config), golden.under("param/")
    a = convert.load_v1(config, tensors)
    b = convert.load_v1(config, _as_cuda(tensors))
    assert a[0] == b[0]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a[1], b[1]))


def test_tied_model_may_have_a_copy_of_the_embedding_as_its_head():
    golden = golden_files.load("xlstm_lm_tied")
    tensors = golden.under("param/")
    tensors["lm_head.weight"] = tensors["token_embedding.weight"]
    tensors["xlstm_block_stack.blocks.0.xlstm.mlstm_cell.causal_mask"] = np.zeros((32, 32), bool)
    cfg, params = convert.load_v1(published.nested(golden.config), tensors)
    assert cfg.tie_embeddings and "lm_head" not in params
