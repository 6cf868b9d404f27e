"""Validation of model configs, and their JSON round trip."""

import pytest

from tests.modules import models
from xlstm_jax.config import ConfigError, from_dict, to_dict
from xlstm_jax.modules import BLOCKS, LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig, presets


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pattern=""), "pattern must have at least one letter, got ''; try"),
        (dict(pattern="mxs"), "pattern='mxs': letter='x' is not known; use one of: m, s, M"),
        (dict(dim=0), "dim must be at least 1, got 0;"),
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0;"),
        (dict(dtype="float16"), "dtype must be one of 'float32', 'bfloat16', got 'float16'."),
        (
            dict(remat="some"),
            "remat must be one of 'none', 'full', 'dots', 'names', 'off",
        ),
        (
            dict(final_norm="batch"),
            "final_norm must be one of 'layer', 'rms', 'none', got",
        ),
        (
            dict(dropout=1.0),
            "dropout must be at least 0 and below 1, got 1.0; the default is 0.0.",
        ),
        (
            dict(mlstm=MLSTMConfig(num_heads=5, inner_dim=24)),
            "mlstm.num_heads must divide the inner width=24, got 5; use for example 3, 4, 6,",
        ),
        (
            dict(mlstm=MLSTMConfig(num_heads=2, inner_dim=24, qkv_block_size=5)),
            "mlstm.qkv_block_size must divide the inner width=24, got 5;",
        ),
        (dict(slstm=SLSTMConfig(num_heads=3)), "slstm.num_heads must divide dim=16, got 3;"),
        (dict(large=LargeConfig(num_heads=3)), "large.num_heads must divide qk_dim=8, got 3;"),
        (
            dict(large=LargeConfig(num_heads=8, v_dim=12)),
            "large.num_heads must divide v_dim=12, got 8;",
        ),
    ],
)
def test_invalid_value_is_rejected_with_a_message(changes, message):
    with pytest.raises(ConfigError) as error:
        models.config(**changes)
    assert message in str(error.value)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MLSTMConfig(conv_width=-1), "mlstm.conv_width must be at least 0, got -1;"),
        (lambda: MLSTMConfig(chunk_size=0), "mlstm.chunk_size must be at least 1, got 0;"),
        (lambda: MLSTMConfig(input_gate="relu"), "input_gate must be one of 'exp', 'sigmoid'"),
        (
            lambda: MLSTMConfig(implementation="fast"),
            "mlstm.implementation='fast' is not known; use one of: auto, ",
        ),
        (lambda: SLSTMConfig(implementation="fast"), "slstm.implementation='fast' is not known;"),
        (lambda: MLSTMConfig(normalize=False), "use one of: sigmoid"),
        (lambda: LargeConfig(normalize=False), "use one of: sigmoid"),
        (lambda: SLSTMConfig(forget_gate="relu"), "slstm.forget_gate must be one of 'sigmoid'"),
        (lambda: SLSTMConfig(bias_init="ones"), "slstm.bias_init must be one of 'powerlaw"),
        (lambda: SLSTMConfig(num_heads=0), "slstm.num_heads must be at least 1, got 0;"),
        (lambda: SLSTMConfig(ffn_dim=-1), "slstm.ffn_dim must be at least 0, got -1;"),
        (lambda: SLSTMConfig(ffn_activation="tanh"), "slstm.ffn_activation='tanh' is not known;"),
        (lambda: SLSTMConfig(ffn_dropout=-0.1), "slstm.ffn_dropout must be at least 0"),
    ],
)
def test_layer_config_rejects_invalid_options(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


def test_options_of_unused_kinds_are_not_checked_against_dim():
    heads = MLSTMConfig(num_heads=7)
    assert models.config(pattern="M", mlstm=heads).mlstm == heads
    with pytest.raises(ConfigError, match=r"mlstm\.num_heads"):
        models.config(pattern="m", mlstm=heads)


@pytest.mark.parametrize("name", ["xlstm_7b", "xlstm_125m_7:1"])
def test_config_round_trips_through_json(name):
    cfg = presets.get(name)
    assert from_dict(LMConfig, to_dict(cfg)) == cfg


def test_every_builtin_kind_has_a_field_of_options():
    for letter, kind in BLOCKS.items():
        changed = models.config(letter, **{kind.name: kind.options(num_heads=1)})
        assert (
            changed.options_of(letter) == getattr(changed, kind.name) == kind.options(num_heads=1)
        )


def test_has_dropout_is_true_if_any_used_block_has_dropout():
    with_dropout = SLSTMConfig(num_heads=2, ffn_dropout=0.1)
    assert (
        models.config("m", dropout=0.1).has_dropout
        and models.config("s", slstm=with_dropout).has_dropout
    )
    assert not models.config("m", slstm=with_dropout).has_dropout
