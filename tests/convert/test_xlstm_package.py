"""Models converted from the package `xlstm` give its outputs; skipped if it is not installed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from xlstm_jax import convert
from xlstm_jax.modules import LM, Backbone

REASON = "the PyTorch models need torch and xlstm"
torch = pytest.importorskip("torch", reason=REASON)
xlstm = pytest.importorskip("xlstm", reason=REASON)

MODELS = {
    "m s m": {"slstm_at": [1]},
    "tied": {"slstm_at": [1], "tie_weights": True},
    "s s s": {"slstm_at": "all"},
    "m m m": {"slstm_at": []},
    "biases, dropout, no final norm": {
        "slstm_at": [1],
        "bias": True,
        "dropout": 0.1,
        "add_post_blocks_norm": False,
    },
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
    return config, _perturbed(model)


def _perturbed(model):
    """Adds noise to all parameters: a wrong conversion of zeros would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _arrays(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def _assert_close(actual, reference):
    expected = reference.detach().numpy()
    assert np.abs(np.asarray(actual) - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_model_and_bare_stack_match_the_package(name, caplog):
    config, reference = _model(**MODELS[name])
    ids = torch.randint(0, 50, (2, 20))
    cfg, params = convert.load_v1(dataclasses.asdict(config), _arrays(reference))
    logits, _ = LM(cfg).apply({"params": params}, jnp.asarray(ids.numpy()))
    _assert_close(logits, reference(ids))

    x = torch.randn(2, 20, 64)
    stack = reference.xlstm_block_stack
    cfg, params = convert.load_v1(dataclasses.asdict(stack.config), _arrays(stack))
    y, _ = Backbone(cfg).apply({"params": params}, jnp.asarray(x.numpy()))
    _assert_close(y, stack(x))
    assert not caplog.text, "a field of the config is unknown"


LARGE = {
    "default": {},
    "non-default": {
        "use_bias": True,
        "add_out_norm": False,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 0.5,
        "ffn_proj_factor": 1.5,
        "gate_soft_cap": 5.0,
        "output_logit_soft_cap": 10.0,
    },
}


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("name", LARGE)
def test_large_model_matches_the_package(name, weight_mode, tmp_path, caplog):
    large = pytest.importorskip("xlstm.xlstm_large.model", reason=REASON)
    config = large.xLSTMLargeConfig(
        embedding_dim=64,
        num_heads=4,
        num_blocks=2,
        vocab_size=50,
        weight_mode=weight_mode,
        mode="inference",
        return_last_states=True,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
        **LARGE[name],
    )
    torch.manual_seed(0)
    reference = _perturbed(large.xLSTMLarge(config).eval())
    # Every JSON document is valid YAML.
    (tmp_path / "config.yaml").write_text(json.dumps(dataclasses.asdict(config)))
    safetensors.numpy.save_file(_arrays(reference), tmp_path / "model.safetensors")
    cfg, params = convert.load_large(tmp_path)
    ids = torch.randint(0, 50, (2, 20))
    logits, _ = LM(cfg).apply({"params": params}, jnp.asarray(ids.numpy()))
    _assert_close(logits, reference(ids)[0])
    assert not caplog.text, "a field of the config is unknown"
