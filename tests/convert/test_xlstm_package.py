"""Beside the official package `xlstm`, where it is installed: its own configs and state dicts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from xlstm_jax import convert
from xlstm_jax.modules import LM, Backbone

REASON = "the first generation's own modules need the packages torch and xlstm"
torch = pytest.importorskip("torch", reason=REASON)
xlstm = pytest.importorskip("xlstm", reason=REASON)

MODELS = {
    "m s m": {"slstm_at": [1]},
    "tied": {"slstm_at": [1], "tie_weights": True},
    "s s s": {"slstm_at": "all"},
    "m m m": {"slstm_at": []},
    "biases": {"slstm_at": [1], "bias": True, "dropout": 0.1, "add_post_blocks_norm": False},
}


def _model(**options):
    config = xlstm.xLSTMLMModelConfig(
        vocab_size=50,
        context_length=32,
        num_blocks=3,
        embedding_dim=64,
        mlstm_block=xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4)),
        slstm_block=xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4),
            feedforward=xlstm.FeedForwardConfig(act_fn="relu^2"),
        ),
        **options,
    )
    torch.manual_seed(0)
    model = xlstm.xLSTMLMModel(config).eval()
    model.reset_parameters()
    with torch.no_grad():
        for parameter in model.parameters():  # none is where zeros hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return config, model


def _arrays(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def _assert_close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_stack_compute_the_same_here(name, caplog):
    config, theirs = _model(**MODELS[name])
    ids = torch.randint(0, 50, (2, 20))
    cfg, params = convert.load_v1(dataclasses.asdict(config), _arrays(theirs))
    logits, _ = LM(cfg).apply({"params": params}, jnp.asarray(ids.numpy()))
    _assert_close(logits, theirs(ids))

    x = torch.randn(2, 20, 64)
    stack = theirs.xlstm_block_stack
    cfg, params = convert.load_v1(dataclasses.asdict(stack.config), _arrays(stack))
    y, _ = Backbone(cfg).apply({"params": params}, jnp.asarray(x.numpy()))
    _assert_close(y, stack(x))
    assert not caplog.text, "a field of their own config is unknown"
