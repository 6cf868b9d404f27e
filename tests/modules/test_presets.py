"""Presets have exactly the published parameter counts."""

import csv
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from tests import golden_files
from xlstm_jax import flops, hub
from xlstm_jax.config import ConfigError
from xlstm_jax.modules import LM, LMConfig, presets

# arXiv:2503.13427; arXiv:2405.04517, table of sizes; arXiv:2510.02228, logged runs.
PUBLISHED = {
    "xlstm_7b": 6_865_424_896,
    "xlstm_125m_1:0": 163_806_144,
    "xlstm_350m_1:0": 409_290_112,
    "xlstm_760m_1:0": 840_427_392,
    "xlstm_1.3b_1:0": 1_422_559_616,
    "xlstm_2.7b_1:0": 2_788_396_032,
    "xlstm_125m_7:1": 163_690_928,
    "xlstm_350m_7:1": 408_436_048,
    "xlstm_760m_7:1": 839_736_144,
    "xlstm_1.3b_7:1": 1_420_065_104,
    "xlstm_2.7b_7:1": 2_781_617_088,
    "scaling_160m": 164_110_224,
    "scaling_400m": 406_856_896,
    "scaling_830m": 841_496_256,
    "scaling_1.4b": 1_420_839_104,
    "scaling_2.7b": 2_780_449_600,
    "scaling_7b": 6_865_424_896,
    "scaling_d512_l10_h4": 83_680_848,
    "scaling_d640_l13_h5": 128_928_130,
    "scaling_d896_l27_h7": 353_766_266,
    "scaling_d1024_l18_h4": 330_898_576,
    "scaling_d1152_l24_h9": 503_996_976,
    "scaling_d1280_l30_h5": 724_018_220,
    "scaling_d1408_l27_h11": 787_359_826,
    "scaling_d1536_l24_h6": 841_643_808,
    "scaling_d1792_l30_h7": 1_340_701_348,
    "scaling_d2048_l36_h8": 2_028_825_152,
    "scaling_d2304_l33_h9": 2_350_131_282,
    "scaling_d2560_l29_h10": 2_544_671_300,
    "scaling_d2816_l34_h11": 3_533_345_772,
    "scaling_d3072_l36_h12": 4_410_154_848,
    "scaling_d3328_l32_h13": 4_597_755_968,
    "scaling_d3584_l36_h14": 5_930_162_672,
    "scaling_d4096_l30_h16": 6_464_058_304,
    "llama_125m": 162_220_800,
    "llama_350m": 406_635_520,
    "llama_760m": 834_086_400,
    "llama_1.3b": 1_420_396_544,
    "llama_2.7b": 2_779_548_160,
    "mamba_125m": 167_787_264,
    "mamba_350m": 423_052_288,
    "mamba_760m": 870_508_032,
    "mamba_1.3b": 1_475_250_176,
    "mamba_2.7b": 2_897_185_280,
    "rwkv4_125m": 169_383_936,
    "rwkv4_350m": 430_452_736,
    "rwkv4_760m": 891_045_888,
    "rwkv4_1.3b": 1_515_216_896,
    "rwkv4_2.7b": 2_984_765_440,
    "scaling_llama_d4096_l32_h32": 6_863_196_160,
}


def _count(cfg: LMConfig) -> int:
    shapes = jax.eval_shape(LM(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_formula_gives_the_published_parameter_count(name):
    assert flops.count_params(presets.get(name)) == PUBLISHED[name]


def test_every_run_of_the_scaling_study_is_a_preset_with_the_logged_count():
    sizes = ("embedding_dim", "num_blocks", "num_heads", "num_params")
    with golden_files.reference("runs.csv").open(newline="") as file:
        runs = [run for run in csv.DictReader(file) if run["num_params"]]
    logged = {(run["model"], *(int(run[size]) for size in sizes)) for run in runs}
    ours = set()
    for name in presets.names():
        if name.startswith("scaling_"):
            cfg = presets.get(name)
            model = "mlstm" if set(cfg.pattern) == {"M"} else "llama"
            heads = (cfg.large if model == "mlstm" else cfg.attention).num_heads
            ours.add((model, cfg.dim, cfg.num_blocks, heads, flops.count_params(cfg)))
    assert len(logged) > 100 and logged <= ours


def test_the_documentation_lists_published_counts_beside_ours():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    for name in ("xlstm_7b", *(f"scaling_{size}" for size in presets.LADDER)):
        ours, published = flops.count_params(presets.get(name)), PUBLISHED[name]
        assert re.search(rf"\| `{name}` \|.*\| {ours:,} \| {published:,} \|", text), name


def test_published_checkpoints_have_the_count_of_their_preset():
    for name, (address, count) in presets.CHECKPOINTS.items():
        assert hub.parse(address).revision is None
        assert flops.count_params(presets.get(name)) == count == PUBLISHED[name]


def test_plain_lstms_have_the_parameters_of_the_ablation_but_one_bias():
    """arXiv:2405.04517, table 2: 607.8, 506.1 and 505.9 million, with PyTorch's two biases."""
    width, blocks = presets.VOCAB_SIZE, {"l": (1536, 24, 607.8), "L": (1024, 24, 505.9)}
    for letter, (dim, count, millions) in blocks.items():
        norm = "none" if letter == "l" else "rms"
        cfg = LMConfig(vocab_size=width, dim=dim, pattern=letter * count, final_norm=norm)
        assert round((flops.count_params(cfg) + 4 * dim * count) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "name",
    ["xlstm_7b", "xlstm_125m_1:0", "xlstm_125m_7:1", "xlstm_2.7b_7:1", "scaling_160m"]
    + ["llama_125m", "mamba_125m", "rwkv4_125m", "mamba2_125m", "gated_delta_125m"],
)
def test_model_has_the_published_parameter_count(name):
    cfg = presets.get(name)
    assert _count(cfg) == PUBLISHED.get(name, flops.count_params(cfg))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if "_d" in name else pytest.mark.slow)
        for name in presets.names()
    ],
)
def test_formula_counts_the_parameters_of_every_preset(name):
    cfg = presets.get(name)
    assert _count(cfg) == flops.count_params(cfg)


def test_the_table_in_the_documentation_has_these_counts():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    families = ("llama", "mamba", "rwkv4", "mamba2", "gated_delta")
    for size in ("125m", "350m", "760m", "1.3b", "2.7b"):
        entry = next(line for line in text.splitlines() if line.startswith(f"| `{size}`"))
        counts = [flops.count_params(presets.get(f"{family}_{size}")) for family in families]
        numbers = [cell.strip() for cell in entry.strip("|").split("|")[1:]]
        assert numbers[0::2][:3] + numbers[6:] == [f"{count:,}" for count in counts]
        published = [f"{count / 1e6:,.1f} M" for count in counts[:3]]
        assert numbers[1:6:2] == published


def test_presets_of_equal_shape_are_equal():
    assert presets.get("scaling_160m") == presets.get("scaling_d768_l12_h6")
    assert presets.get("scaling_7b") == presets.get("xlstm_7b")
    assert len(presets.names()) == len(set(presets.names())) == 156


def test_unknown_preset_is_rejected():
    with pytest.raises(ConfigError, match="preset 'xlstm_8b' is not known; did you mean xlstm_7b"):
        presets.get("xlstm_8b")
    with pytest.raises(ConfigError, match="presets.names\\(\\) lists all"):
        presets.get("gpt2")
