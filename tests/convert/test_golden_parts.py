"""First-generation layers and blocks against golden vectors of the package `xlstm`."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import golden_files
from tests.convert import published
from tests.golden_files import assert_all_match, assert_matches
from xlstm_jax.convert import v1
from xlstm_jax.modules import BLOCKS, LMConfig
from xlstm_jax.modules.mlstm import MLSTMLayer
from xlstm_jax.modules.slstm import SLSTMLayer

# Golden file -> block letter, prefix of PyTorch names, prefix of parameter paths.
PARTS = {
    "mlstm_layer": ("m", "xlstm.", "stack/m/mlstm/"),
    "mlstm_layer_bias": ("m", "xlstm.", "stack/m/mlstm/"),
    "mlstm_block": ("m", "", "stack/m/"),
    "slstm_layer": ("s", "xlstm.", "stack/s/slstm/"),
    "slstm_layer_no_conv": ("s", "xlstm.", "stack/s/slstm/"),
    "slstm_block": ("s", "", "stack/s/"),
}

every_part = pytest.mark.parametrize("name", PARTS)
both_dtypes = pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)


def _config(letter: str, config: dict) -> LMConfig:
    """A model with one block of this kind, from the flat config of a golden file."""
    feedforward = dict(config.get("feedforward", {}))
    feedforward.pop("up_dim", None)
    layer = {k: v for k, v in config.items() if k not in ("feedforward", "inner_dim", "block_idx")}
    model = {k: layer.pop(k) for k in ("embedding_dim", "bias", "context_length") if k in layer}
    model["num_blocks"] = layer.pop("num_blocks", 1)
    model["slstm_at"] = list(range(model["num_blocks"])) if letter == "s" else []
    slstm = {"slstm": layer if letter == "s" else {}, "feedforward": feedforward}
    blocks = {"mlstm_block": {"mlstm": layer if letter == "m" else {}}, "slstm_block": slstm}
    return dataclasses.replace(v1.config_of(model | blocks, bare=True), pattern=letter)


class Part:
    """The layer or block of a golden file, with its parameters and input in `dtype`."""

    def __init__(self, name: str, dtype: str):
        self.golden = golden_files.load(name)
        self.letter, *self.prefixes = PARTS[name]
        self.cfg = _config(self.letter, self.golden.config)
        is_block = name.endswith("block")
        if is_block:
            self.module = BLOCKS[self.letter].block(self.cfg)
        elif self.letter == "m":
            self.module = MLSTMLayer(self.cfg.mlstm, 1)
        else:
            self.module = SLSTMLayer(self.cfg.slstm, 1)
        params = published.part_params(self.cfg, self.golden.under("param/"), *self.prefixes)
        self.params = published.cast(params, dtype)
        self.x = published.cast(self.golden.arrays["input/x"], dtype)
        B, _, D = self.x.shape
        sizes = (B,) if is_block else (B, D, np.dtype(dtype))
        self.init_state = self.module.init_state(*sizes)
        sequence_state = self.init_state
        if self.letter == "m":
            sequence_state = published.without_initial_m(sequence_state)
        self.sequence_init_state = published.cast(sequence_state, dtype)

    def apply(self, params, x, state):
        return self.module.apply({"params": params}, x, state)


@pytest.mark.slow
@every_part
@both_dtypes
def test_values_and_gradients_match(name, dtype, x64):
    part = Part(name, dtype)
    dy = published.cast(part.golden.arrays["input/dy"], dtype)

    @jax.jit
    def value_and_grads(params, x):
        y, pullback = jax.vjp(lambda p, x: part.apply(p, x, part.sequence_init_state)[0], params, x)
        return y, pullback(dy)

    y, (dparams, dx) = value_and_grads(part.params, part.x)
    assert_matches(y, part.golden.arrays["output64/y"], published.VALUES[dtype], "y")
    actual = published.part_tensors(part.cfg, dparams, *part.prefixes)
    expected = part.golden.under("grad64/param/")
    assert_all_match(
        actual | {"x": dx},
        expected | {"x": part.golden.arrays["grad64/input/x"]},
        published.GRADIENTS[dtype],
    )


@every_part
def test_outputs_and_final_state_match_step_by_step(name):
    part = Part(name, "float32")
    step, state, ys = jax.jit(part.apply), part.init_state, []
    for t in range(part.x.shape[1]):
        y, state = step(part.params, part.x[:, t : t + 1], state)
        ys.append(y)
    tolerance = published.VALUES["float32"]
    assert_matches(np.concatenate(ys, axis=1), part.golden.arrays["output/y_step"], tolerance, "y")
    published.assert_same_layer_state(state, part.golden.under("state/"), tolerance)
