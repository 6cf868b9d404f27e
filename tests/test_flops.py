"""Cost formulas: parameter counts of real models, and published FLOPs."""

import dataclasses
import random
from typing import Any

import jax
import pytest

from xlstm_jax import flops
from xlstm_jax.config import ConfigError
from xlstm_jax.errors import ArgumentError, UnsupportedError
from xlstm_jax.modules import (
    BLOCKS,
    LM,
    LargeConfig,
    LMConfig,
    MLSTMConfig,
    SLSTMConfig,
    counts,
    presets,
)
from xlstm_jax.modules.baselines import options
from xlstm_jax.modules.lm import param_shapes


def _random_config(rng: random.Random) -> LMConfig:
    heads = rng.choice([1, 2, 4])
    dim = heads * rng.choice([4, 8, 12])
    return LMConfig(
        vocab_size=rng.randint(3, 40),
        dim=dim,
        pattern="".join(rng.choices("msMlLawhbBdr", k=rng.randint(1, 2))),
        mlstm=MLSTMConfig(
            num_heads=heads,
            inner_dim=rng.choice([None, heads * 8]),
            qkv_block_size=rng.choice([1, 2, 4]),
            conv_width=rng.randint(0, 4),
            conv_mixing=rng.random() < 0.5,
            use_bias=rng.random() < 0.5,
        ),
        slstm=SLSTMConfig(
            num_heads=heads,
            conv_width=rng.randint(0, 4),
            conv_mixing=rng.random() < 0.5,
            group_norm_weight=rng.random() < 0.5,
            ffn_dim=rng.choice([None, 0, 7]),
            ffn_bias=rng.random() < 0.5,
        ),
        large=LargeConfig(
            num_heads=heads,
            qk_dim=rng.choice([None, heads * 3]),
            v_dim=rng.choice([None, heads * 5]),
            ffn_dim=rng.choice([None, 9]),
            use_bias=rng.random() < 0.5,
        ),
        **_baselines(rng, heads),
        embedding_norm=rng.choice(["none", "layer_scale"]),
        final_norm=rng.choice(["layer", "rms", "none", "layer_scale", "rms_offset"]),
        final_norm_bias=rng.random() < 0.5,
        tie_embeddings=rng.random() < 0.5,
    )


def _baselines(rng: random.Random, heads: int) -> dict[str, Any]:
    flag = lambda: rng.random() < 0.5  # noqa: E731
    attention = dict(
        num_heads=2 * heads,
        num_kv_heads=rng.choice([None, heads]),
        head_dim=rng.choice([6, 10]),
        qk_norm=flag(),
        output_gate=flag(),
        use_bias=flag(),
        norm_offset=flag(),
        ffn_dim=rng.choice([None, 9]),
    )
    delta = dict(num_heads=2 * heads, num_qk_heads=rng.choice([None, heads]))
    delta |= dict(qk_dim=rng.choice([3, 5]), v_dim=rng.choice([None, 7]))
    mamba = dict(conv_width=rng.randint(1, 4), conv_bias=flag(), use_bias=flag())
    return dict(
        lstm=options.LSTMConfig(num_heads=heads, ffn_dim=rng.choice([None, 9])),
        attention=options.AttentionConfig(**attention),
        window=options.WindowConfig(**attention),
        hybrid=options.HybridConfig(num_heads=heads, ffn_dim=rng.choice([None, 9])),
        mamba=options.MambaConfig(state_dim=5, dt_rank=rng.choice([None, 3]), **mamba),
        mamba2=options.Mamba2Config(inner_dim=24, head_dim=6, groups=2, state_dim=5, **mamba),
        gated_delta=options.GatedDeltaConfig(**delta),
        rwkv4=options.RWKV4Config(inner_dim=rng.choice([None, 10]), ffn_dim=rng.choice([None, 9])),
    )


def test_parameter_formula_equals_the_size_of_the_parameters():
    rng = random.Random(1)
    for _ in range(24):
        cfg = _random_config(rng)
        num_params = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(cfg)))
        assert flops.count_params(cfg) == num_params, cfg


def test_cell_flops_equal_the_published_figures():
    assert counts.first_cell_flops(64, 128, 256) == 11_736_389
    assert counts.tfla_cell_flops(64, 128, 256) == 11_719_877
    assert counts.tfla_cell_flops(128, 128, 256) == 26_560_581


def test_recurrent_and_parallel_forms_are_counted_as_published():
    K, V, T, fraction = 128, 256, 1000, 0.75
    assert counts.recurrent_cell_flops(K, V) == 9 + 4 * K * V + 6 * K + V + 3 + 2 * K * V + K
    gates = T * (T + 1) / 2 + 2 * T + 6 * T**2
    products = fraction * (2 * T**2 * K + 2 * T**2) + fraction * (4 * T**2 + 2 * T)
    assert counts.parallel_cell_flops(T, K, V) == gates + products + 2 * fraction * T**2 * V


@pytest.mark.parametrize(
    "shape, num_params",
    [
        ("d768_l12_h6", 164_110_224),
        ("d2048_l24_h8", 1_421_232_512),
        ("1.4b", 1_420_839_104),
        ("llama_d768_l12_h12", 162_220_800),
        ("llama_d2048_l24_h16", 1_420_396_544),
        ("llama_d4096_l32_h32", 6_863_196_160),
    ],
)
def test_parameters_of_the_scaling_study_equal_the_published_counts(shape, num_params):
    assert flops.count_params(presets.get(f"scaling_{shape}")) == num_params


@pytest.mark.parametrize("count, published", [("first", 3.52091670e7), ("tfla", 3.51596310e7)])
def test_share_of_the_cells_equals_the_published_figure(count, published):
    H, K, V, D = 8, 128, 256, 2048
    assert 24 * H / 64 * counts.CELL_FLOPS[count](64, K, V) == pytest.approx(published, rel=1e-8)
    F, vocab = 5504, 50304
    linear = 2 * D * H * (2 * K + V + 2) + 4 * D * H * V + H * V + 6 * D * F + 2 * F
    total = flops.forward_flops(presets.scaling(D, 24, H), 1000, count=count)
    assert total / 1000 - 24 * linear - 2 * D * vocab == pytest.approx(published, rel=1e-8)


@pytest.mark.parametrize("seq_len", [2048, 8192, 16384])
def test_flops_per_token_of_a_large_model_equal_the_published_figure(seq_len):
    cfg = presets.scaling(2048, 24, 8)
    per_token = flops.forward_flops(cfg, seq_len) / seq_len
    assert per_token == pytest.approx(2.67164258e9, rel=1e-8)


@pytest.mark.parametrize(
    "count, published", [("first", 2.809832926150656e18), ("tfla", 2.809679137800192e18)]
)
def test_flops_of_a_training_run_equal_the_published_figure(count, published):
    cfg = presets.get("scaling_160m")
    assert 128 * 3500 * flops.train_flops(cfg, 8192, count=count) == pytest.approx(published, 1e-12)


@pytest.mark.parametrize(
    "seq_len, attention, published",
    [
        (2048, "causal", 2.83810406e9),
        (8192, "causal", 3.44798208e9),
        (16384, "causal", 4.26115277e9),
        (2048, "full", 2.83810406e9 - 2.03292672e8 + 4.05012480e8),
    ],
)
def test_flops_per_token_of_a_transformer_equal_the_published_figure(seq_len, attention, published):
    cfg = presets.get("scaling_llama_d2048_l24_h16")
    total = flops.forward_flops(cfg, seq_len, attention=attention)
    assert total / seq_len == pytest.approx(published, rel=1e-8)


def test_flops_of_a_training_run_of_a_transformer_equal_the_published_figure():
    cfg = presets.get("scaling_llama_d768_l12_h12")
    assert 128 * 3500 * flops.train_flops(cfg, 8192) == pytest.approx(4.416454740934656e18, 1e-12)


def test_a_window_bounds_the_flops_per_token():
    cfg = LMConfig(vocab_size=8, dim=32, pattern="w")
    costs = [flops.forward_flops(cfg, T) / T for T in (64, 256, 10**5, 10**6)]
    assert costs == sorted(costs) and costs[3] / costs[2] < 1.001
    beyond = (256 + 4) * 4 * (4 * 8 + 5)  # window and sinks of four heads of width 8
    without = flops.forward_flops(cfg, 1) - 4 * (4 * 8 + 5) / 2
    assert costs[3] == pytest.approx(without + beyond, rel=1e-3)


def test_cells_add_at_most_35_percent_to_six_flops_per_parameter():
    """6 N, without the embedding, is the cost of the products with parameters."""
    for name in ("xlstm_1.3b_1:0", "xlstm_1.3b_7:1", "xlstm_7b"):
        cfg = presets.get(name)
        without_embedding = flops.count_params(cfg) - cfg.vocab_size * cfg.dim
        ratio = flops.train_flops(cfg, 2048) / (6 * without_embedding * 2048)
        assert 1.0 < ratio < 1.35, (name, ratio)


def test_flops_of_blocks_of_different_kinds_add_up():
    cfg = dataclasses.replace(presets.get("xlstm_125m_1:0"), pattern="m")
    costs = [
        flops.forward_flops(dataclasses.replace(cfg, pattern=pattern), 100)
        for pattern in ("m", "s", "ms")
    ]
    head = 100 * 2 * cfg.vocab_size * cfg.dim
    assert costs[2] == pytest.approx(costs[0] + costs[1] - head)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(seq_len=0), "seq_len must be at least 1, got 0"),
        (
            dict(seq_len=8, attention="all"),
            "attention='all' is not known; use one of: causal, full",
        ),
        (dict(seq_len=8, count="all"), "count='all' is not known; use one of: first, tfla"),
    ],
)
def test_invalid_arguments_raise_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        flops.train_flops(presets.get("scaling_160m"), **arguments)


@pytest.mark.parametrize(
    "preset, prompt_len, published_flops, published_bytes",
    [
        ("scaling_d1024_l24_h4", 128, 8.044475e10, 9.099770e8),
        ("scaling_d1024_l24_h4", 2048, 1.285571e12, 3.897693e9),
        ("scaling_llama_d1024_l24_h16", 2048, 1.517410e12, None),
    ],
)
def test_cost_of_prefill_equals_the_published_figure(
    preset, prompt_len, published_flops, published_bytes
):
    cost = flops.inference_cost(presets.get(preset), batch_size=1, prompt_len=prompt_len)
    assert cost.flops == pytest.approx(published_flops, rel=5e-7)
    if published_bytes is not None:
        assert cost.bytes == pytest.approx(published_bytes, rel=5e-7)


def test_keys_that_attention_reads_while_it_decodes_are_those_of_the_formula():
    cfg = presets.get("scaling_llama_d1024_l24_h16")
    H, K, prompt, new = 16, 64, 1000, 200
    cost = flops.inference_cost(cfg, batch_size=1, prompt_len=prompt, new_tokens=new)
    prefill = flops.inference_cost(cfg, batch_size=1, prompt_len=prompt)
    D, F, vocab = 1024, 2752, 50304
    per_token = 8 * D + 8 * D * D + 6 * D * F + 2 * F
    pairs = 2 * 0.65 * H * (2 * K + 2.5) * (prompt * new + new * (new + 1) / 2)
    expected = 24 * (new * per_token + pairs) + new * 2 * D * vocab
    assert cost.flops - prefill.flops == pytest.approx(expected, rel=1e-12)
    keys = 2 * K * H * (new + prompt * new + new * (new - 1) / 2)
    moved = D + (D + 3 * H * K) + (D + H * K) + D + 3 * (D + F)
    weights = flops.count_params(cfg) - D * vocab
    expected = 24 * (new * moved + keys) + new * (D + 2 * D + vocab) + new * weights
    assert cost.bytes - prefill.bytes == pytest.approx(2 * expected, rel=1e-12)


@pytest.mark.parametrize("letter", "msMlLawhbBdr")
def test_decoding_in_two_parts_costs_as_much_as_at_once(letter):
    cfg = LMConfig(vocab_size=9, dim=64, pattern=letter)
    cost = lambda **lengths: flops.inference_cost(cfg, batch_size=3, **lengths)  # noqa: E731
    at_once = cost(prompt_len=200, new_tokens=300)
    rest = cost(prompt_len=290, new_tokens=210)
    prefills = cost(prompt_len=200), cost(prompt_len=290)
    first = cost(prompt_len=200, new_tokens=90)
    for i in range(2):
        parts = first[i] + rest[i] - prefills[1][i]
        assert at_once[i] == pytest.approx(parts, rel=1e-12)
        assert at_once[i] > prefills[0][i] > 0


@pytest.mark.parametrize("letter", "msMlLawhbBdr")
def test_cost_of_a_prompt_is_near_that_of_the_forward_pass(letter):
    """Norms, residual additions, chunk sizes and the tiles of a cell are counted differently."""
    cfg = LMConfig(vocab_size=9, dim=256, pattern=letter)
    head = 2 * cfg.vocab_size * cfg.dim
    forward = flops.forward_flops(cfg, 512, count="tfla") - 512 * head
    prefill = flops.inference_cost(cfg, batch_size=1, prompt_len=512).flops - head
    assert prefill == pytest.approx(forward, rel=0.1)


@pytest.mark.parametrize(
    "letter, options",
    [
        ("m", MLSTMConfig(covariance_update=False)),
        ("m", MLSTMConfig(input_gate_kernel=False, forget_gate_kernel=False)),
        ("s", SLSTMConfig(memory_mixing=False)),
        ("M", LargeConfig(ffn_activation="gelu")),
        ("L", options.LSTMConfig(ffn_dim=0)),
    ],
)
def test_options_that_remove_parts_make_inference_cheaper(letter, options):
    cfg = LMConfig(vocab_size=9, dim=256, pattern=letter)
    smaller = dataclasses.replace(cfg, **{BLOCKS[letter].name: options})
    lengths = dict(batch_size=1, prompt_len=512)
    flops_of = lambda cfg: flops.inference_cost(cfg, **lengths).flops  # noqa: E731
    assert flops_of(smaller) < flops_of(cfg)
    head = 2 * cfg.vocab_size * cfg.dim
    forward = flops.forward_flops(smaller, 512, count="tfla") - 512 * head
    assert flops_of(smaller) - head == pytest.approx(forward, rel=0.1)
    leaves = jax.tree.leaves(
        jax.eval_shape(lambda: LM(dataclasses.replace(smaller, dtype="bfloat16")).init_state(1))
    )
    assert flops.state_bytes(smaller, 1) == sum(x.size * x.dtype.itemsize for x in leaves)


def test_size_of_the_state_equals_that_of_the_arrays():
    rng = random.Random(2)
    for letter in "msMlLawhbBdr":
        cfg = dataclasses.replace(_random_config(rng), pattern=letter, dtype="bfloat16")
        leaves = jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(lambda cfg=cfg: LM(cfg).init_state(3))
        )
        # Attention also counts its positions.
        sizes = [x.size * x.dtype.itemsize for _, x in leaves if x.dtype.kind != "i"]
        assert flops.state_bytes(cfg, 3, context=10**6) == sum(sizes), letter


def test_only_the_state_of_attention_grows_with_the_context():
    for letter in "msMlLawhbBdr":
        cfg = LMConfig(vocab_size=9, dim=64, pattern=letter)
        sizes = [flops.state_bytes(cfg, 1, context) for context in (10, 20, 1000, 2000)]
        assert (sizes[1] > sizes[0]) == (letter in "awh")
        assert (sizes[3] > sizes[2]) == (letter == "a")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=0, prompt_len=1), "batch_size must be at least 1, got 0"),
        (dict(batch_size=1, prompt_len=-1), "prompt_len must be at least 0, got -1"),
        (dict(batch_size=1, prompt_len=0), "prompt_len and new_tokens must not both be 0"),
    ],
)
def test_invalid_arguments_of_inference_raise_an_error(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        flops.inference_cost(presets.get("scaling_160m"), **arguments)


def test_kind_without_formulas_of_inference_is_named(monkeypatch):
    monkeypatch.setitem(BLOCKS, "m", dataclasses.replace(BLOCKS["m"], inference=None))
    cfg = LMConfig(vocab_size=9, dim=64, pattern="m")
    with pytest.raises(UnsupportedError, match="block kind 'mlstm' has no formulas of inference"):
        flops.inference_cost(cfg, batch_size=1, prompt_len=1)
    with pytest.raises(UnsupportedError, match="block kind 'mlstm' has no formulas of inference"):
        flops.state_bytes(cfg, 1)
