"""Validation of model configs, and their JSON round trip."""

import dataclasses
import math
import re
import time

import chex
import jax
import jax.numpy as jnp
import pytest

from tests.modules import models
from xlstm_jax.config import ConfigError, from_dict, to_dict
from xlstm_jax.modules import (
    BLOCKS,
    LM,
    LargeConfig,
    LMConfig,
    MLSTMConfig,
    SLSTMConfig,
    param_shapes,
    presets,
)
from xlstm_jax.modules.baselines import options

FITS = "must fit in {0}.cache_size=2048 beside {0}.num_sinks=4, got 2045; set {0}.cache_size to "
OF_BASELINES = [
    (lambda: options.WindowConfig(window=2045), "window.window " + FITS.format("window")),
    (lambda: options.HybridConfig(window=2045), "hybrid.window " + FITS.format("hybrid")),
    (lambda: options.AttentionConfig(num_sinks=2048), "set attention.cache_size to at least 2049"),
    (lambda: options.AttentionConfig(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got"),
    (lambda: options.AttentionConfig(rotary_fraction=2.0), "must be from 0 to 1, got 2.0"),
    (lambda: options.GatedDeltaConfig(num_qk_heads=3), "num_qk_heads must divide num_heads=4, got"),
    (
        lambda: options.MambaConfig(dt_min=0.2),
        "mamba.dt_max must be at least mamba.dt_min=0.2, got",
    ),
    (lambda: options.Mamba2Config(dt_max=1e-4), "mamba2.dt_max must be at least mamba2.dt_min="),
    *(
        (
            lambda kind=kind: kind(implementation="fast"),
            f"{name}.implementation='fast' is not known",
        )
        for name, kind in {
            "attention": options.AttentionConfig,
            "gated_delta": options.GatedDeltaConfig,
            "hybrid": options.HybridConfig,
            "lstm": options.LSTMConfig,
            "mamba": options.MambaConfig,
            "mamba2": options.Mamba2Config,
            "rwkv4": options.RWKV4Config,
            "window": options.WindowConfig,
        }.items()
    ),
]
"""A function that makes options, and its error."""

FOR_THE_WIDTH = [
    ("l", options.LSTMConfig(num_heads=3), "lstm.num_heads must divide dim=16, got 3; use for"),
    ("a", options.AttentionConfig(num_heads=3), "attention.num_heads must divide dim=16, got 3;"),
    (
        "a",
        options.AttentionConfig(head_dim=7),
        "attention.rotary_fraction must rotate an even number of the 7 features of a head, got 1.0",
    ),
    ("h", options.HybridConfig(num_heads=16), "into heads of an even width, got 1;"),
    ("B", options.Mamba2Config(head_dim=24), "mamba2.head_dim must divide the inner width=32, got"),
    ("B", options.Mamba2Config(head_dim=8, groups=3), "mamba2.groups must divide the number of"),
    ("d", options.GatedDeltaConfig(num_heads=32), "gated_delta.qk_dim must be at least 1, got 0;"),
]
"""A letter, its options, and the error in a model of width 16."""


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
            "final_norm must be one of 'layer', 'rms', 'none', 'layer_scale', 'rms_offset', got",
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
        *(
            (dict(pattern=letter, **{BLOCKS[letter].name: options}), message)
            for letter, options, message in FOR_THE_WIDTH
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
        (lambda: MLSTMConfig(normalize=False), "mlstm.input_gate must be 'sigmoid' with"),
        (lambda: LargeConfig(normalize=False), "large.input_gate must be 'sigmoid' with"),
        (lambda: LargeConfig(forget_gate="relu"), "large.forget_gate must be one of 'sigmoid'"),
        (
            lambda: MLSTMConfig(normalize=False, input_gate="sigmoid", forget_gate="exp"),
            "mlstm.forget_gate must be 'sigmoid' with normalize=False",
        ),
        (lambda: SLSTMConfig(forget_gate="relu"), "slstm.forget_gate must be one of 'sigmoid'"),
        (lambda: SLSTMConfig(bias_init="ones"), "slstm.bias_init must be one of 'powerlaw"),
        (lambda: SLSTMConfig(num_heads=0), "slstm.num_heads must be at least 1, got 0;"),
        (lambda: SLSTMConfig(ffn_dim=-1), "slstm.ffn_dim must be at least 0, got -1;"),
        (lambda: SLSTMConfig(ffn_activation="tanh"), "slstm.ffn_activation='tanh' is not known;"),
        (lambda: SLSTMConfig(ffn_dropout=-0.1), "slstm.ffn_dropout must be at least 0"),
        *OF_BASELINES,
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


@pytest.mark.parametrize("options", [MLSTMConfig, LargeConfig])
def test_default_forget_gate_is_absent_from_json(options):
    """So that fingerprints and config.json of earlier versions stay valid."""
    assert "forget_gate" not in to_dict(options())
    exponential = options(forget_gate="exp")
    assert to_dict(exponential)["forget_gate"] == "exp"
    assert from_dict(options, to_dict(exponential)) == exponential


def test_every_builtin_kind_has_a_field_of_options():
    for letter, kind in BLOCKS.items():
        fields = {field.name for field in dataclasses.fields(kind.options)}
        name = next(name for name in ("num_heads", "groups", "inner_dim") if name in fields)
        options = kind.options(**{name: 1}, **({"head_dim": 16} if letter == "B" else {}))
        changed = models.config(letter, **{kind.name: options})
        assert changed.options_of(letter) == getattr(changed, kind.name) == options


def test_has_dropout_is_true_if_any_used_block_has_dropout():
    with_dropout = SLSTMConfig(num_heads=2, ffn_dropout=0.1)
    assert (
        models.config("m", dropout=0.1).has_dropout
        and models.config("s", slstm=with_dropout).has_dropout
    )
    assert not models.config("m", slstm=with_dropout).has_dropout


NOT_FINITE = (math.nan, math.inf, -math.inf, 1e-46)
# Field -> values that no model can use.
SENSELESS = {
    **dict.fromkeys(("logit_soft_cap", "final_norm_eps", "embedding_std"), (0.0, -1.0)),
    **dict.fromkeys(("mlstm.norm_eps", "slstm.norm_eps", "large.norm_eps"), (0.0, -1.0)),
    **dict.fromkeys(("head_std", "mlstm.eps", "large.eps", "mlstm.input_bias_std"), (-1.0,)),
    **dict.fromkeys(("dropout", "slstm.ffn_dropout"), (-0.1, 1.0, 1 - 1e-9)),
    "large.gate_soft_cap": (0.0, -1.0),
    "large.input_bias": (),
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", SENSELESS)
def test_numbers_that_no_model_can_use_are_rejected(name):
    kind, _, field = name.rpartition(".")
    cls = {"": models.config, "mlstm": MLSTMConfig, "slstm": SLSTMConfig, "large": LargeConfig}
    for value in (*NOT_FINITE, *SENSELESS[name]):
        with pytest.raises(ConfigError, match=re.escape(f"{name} must be ")):
            cls[kind](**{field: value})


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: models.config(vocab_size=10**20), "vocab_size must be at most 2147483647, got"),
        (lambda: models.config(dim="16"), "dim must be int, got '16'."),
        (lambda: models.config("s", dim=2**31 - 1), "slstm.num_heads must divide dim=2147483647"),
        (lambda: models.config("s", dim=10**400), "dim must be at most 2147483647, got an int"),
        (lambda: models.config(pattern=["m"]), "pattern must be str, got ['m']."),
        (lambda: models.config(mlstm=3), "mlstm must be a table of fields, got 3."),
        (lambda: MLSTMConfig(num_heads=2.0), "mlstm.num_heads must be int, got 2.0."),
        (lambda: MLSTMConfig(qkv_block_size=0), "mlstm.qkv_block_size must be at least 1, got 0"),
        (lambda: MLSTMConfig(inner_dim=0), "mlstm.inner_dim must be at least 1, got 0"),
        (lambda: LargeConfig(forget_bias=(3.0, math.inf)), "large.forget_bias[1] must be 0 or a"),
        (lambda: LargeConfig(ffn_dim=-1), "large.ffn_dim must be at least 1, got -1"),
        (lambda: models.config(pattern="m" * 10**6 + "\n"), "letter='\\n' is not known"),
    ],
)
def test_sizes_and_types_that_no_model_can_have_are_rejected(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("pattern", ["M", "MMMM", "mms" * 3, "msmmms", "sMmmMMsM"])
def test_shapes_of_parameters_equal_those_of_init(pattern, remat):
    cfg = models.config(pattern, remat=remat, final_norm="rms", tie_embeddings=len(pattern) == 4)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    expected = jax.eval_shape(LM(cfg).init, jax.random.key(0), tokens)["params"]
    chex.assert_trees_all_equal(param_shapes(cfg), expected)


def test_shapes_of_10000_blocks_cost_no_more_than_those_of_one():
    start = time.process_time()
    cfg = models.config("M" * 10_000, remat="full")
    leaves = jax.tree.leaves(param_shapes(cfg)["stack"])
    assert {leaf.shape[0] for leaf in leaves} == {10_000}
    assert sum(leaf.size for leaf in leaves) == 10_000 * BLOCKS["M"].count_params(cfg)
    assert time.process_time() - start < 5  # about 0.3 s; linear cost would be a minute
