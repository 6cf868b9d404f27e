"""The size paper of every experiment: published parameters, steps and learning rates, and a trace.

Nothing is computed: models of billions of parameters are shapes only.
"""

import ast
import importlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from experiments import ablations, ladder
from xlstm_jax import flops
from xlstm_jax.config import ConfigError
from xlstm_jax.data import Batch
from xlstm_jax.modules import LM
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import init_state
from xlstm_jax.train.step import make_train_step

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


class Run(NamedTuple):
    """What a config must have."""

    parameters: int | float  # an integer: exact; a float: in millions, as printed
    steps: int
    lr: float
    batch: tuple[int, int]  # sequences and their tokens
    second_bias: int = 0  # of LSTMs in PyTorch, which the printed number counts and ours lack


def lm(parameters: int | float, lr: float = 1e-3, steps: int = 30_000, **options) -> Run:
    """A run of the studies with 15B or 300B tokens of 2048-token sequences."""
    batch = (512 if steps == 300_000 else 256, 2048)
    return Run(parameters, steps, lr, batch, **options)


# arXiv:2405.04517, table of sizes: parameters, learning rates at 15B and at 300B tokens.
SIZES = {
    "xlstm_1:0_125m": (163_806_144, 3e-3, 1.5e-3),
    "xlstm_1:0_350m": (409_290_112, 1e-3, 7.5e-4),
    "xlstm_1:0_760m": (840_427_392, 9e-4, 6.25e-4),
    "xlstm_1:0_1.3b": (1_422_559_616, 9e-4, 5e-4),
    "xlstm_1:0_2.7b": (2_788_396_032, 8e-4, None),
    "xlstm_7:1_125m": (163_690_928, 3e-3, 1.5e-3),
    "xlstm_7:1_350m": (408_436_048, 1e-3, 7.5e-4),
    "xlstm_7:1_760m": (839_736_144, 9e-4, 6.25e-4),
    "xlstm_7:1_1.3b": (1_420_065_104, 9e-4, 5e-4),
    "xlstm_7:1_2.7b": (2_781_617_088, 8e-4, None),
    "llama_125m": (162_220_800, 3e-3, 3e-3),
    "llama_350m": (406_635_520, 1.5e-3, 1.5e-3),
    "llama_760m": (834_086_400, 1.25e-3, 1.25e-3),
    "llama_1.3b": (1_420_396_544, 1e-3, 1e-3),
    "llama_2.7b": (2_779_548_160, 8e-4, None),
    "mamba_125m": (167_787_264, 3e-3, 3e-3),
    "mamba_350m": (423_052_288, 1.5e-3, 1.5e-3),
    "mamba_760m": (870_508_032, 1.25e-3, 1.25e-3),
    "mamba_1.3b": (1_475_250_176, 1e-3, 1e-3),
    "mamba_2.7b": (2_897_185_280, 8e-4, None),
    "rwkv4_125m": (169_383_936, 3e-3, 6e-4),
    "rwkv4_350m": (430_452_736, 1e-3, 4e-4),
    "rwkv4_760m": (891_045_888, 2e-3, 2.5e-4),
    "rwkv4_1.3b": (1_515_216_896, 1e-3, 2e-4),
    "rwkv4_2.7b": (2_984_765_440, 8e-4, None),
}
LADDER = {f"{name}_15b": lm(count, lr) for name, (count, lr, _) in SIZES.items()} | {
    f"{name}_300b": lm(count, lr, 300_000 if name.endswith("1.3b") else 600_000)
    for name, (count, _, lr) in SIZES.items()
    if lr is not None
}

# Experiment -> variant, "" for the default -> what its config must have.
PAPER: dict[str, dict[str, Run]] = {
    "fine_tuning": {},  # has no size paper
    "distillation": {},
    "forecaster": {},
    "recurrent_policy": {},
    "tirex": {},
    # Their parameters are not published; the numbers are ours.
    "parity": {"": Run(86_082, 100_000, 1e-3, (256, 39))},
    "formal_languages": {"": Run(86_082, 100_000, 1e-2, (256, 39))},
    "nearest_neighbor": {"": Run(413_056, 100_000, 1e-3, (256, 64))},
    # 64 epochs of 100,000 samples; 80,000 steps of ListOps.
    "mqar": {"": Run(1_104_324, 12_500, 1e-2, (512, 64))},
    "long_range_arena": {"": Run(879_808, 80_000, 1e-3, (32, 2000))},
    "char_lm": {"": Run(26_131_056, 10_000, 1e-3, (32, 1024))},
    "optimizers": {"": Run(26_131_056, 10_000, 3e-3, (32, 1024))},
    # Models of 350M and 1.3B parameters with the settings of the published comparisons.
    "comparison": {"": lm(409.3)},
    "length_extrapolation": {"": LADDER["xlstm_1:0_1.3b_300b"]},
    # Wikitext-103; the sizes of the models of arXiv:2405.04517, figure 2, are not published.
    "rare_tokens": {"": Run(164_073_312, 50_000, 1e-3, (256, 512))},
    "placement": {"": Run(3_469_368, 5_000, 3e-3, (32, 512))},  # has no published run
    # The first run of a sweep; that of the paper sweep is published (arXiv:2510.02228).
    "scaling_micro": {"": Run(19_936, 410, 5e-3, (8, 128))},
    "scaling_paper": {"": Run(83_634_688, 14_000, 3e-3, (512, 2048))},
    "slimpajama_15b": {
        "": lm(409.3),
        "llama": lm(406.6),
        "mamba": lm(423.1),
        "rwkv4": lm(430.5),
        "xlstm_1:0": lm(409.3),
        "xlstm_7:1": lm(408.4),
    },
    "ladder": {"": LADDER["xlstm_1:0_125m_15b"], **LADDER},
    "paloma": {
        "": LADDER["xlstm_1:0_1.3b_300b"],
        "llama_1.3b": LADDER["llama_1.3b_300b"],
    },
    "downstream": {
        "": LADDER["xlstm_1:0_1.3b_300b"],
        "mamba_760m": LADDER["mamba_760m_300b"],
    },
    # Table 2 and 8; the gates have no printed numbers but the last one.
    "ablations": {
        "": lm(408.4),
        "lstm": lm(607.8, second_bias=24 * 4 * 1536),
        "residual": lm(506.1, second_bias=48 * 4 * 1024),
        "up_projection": lm(505.9, second_bias=24 * 4 * 1024),
        "xlstm_0:1": lm(427.3),
        "xlstm_7:1": lm(408.4),
        "forget_1": lm(409_290_112 - 48 * 2 * 4 * 6144),
        "fixed": lm(409_290_112 - 48 * 2 * 4 * 6144),
        "forget": lm(409_290_112 - 48 * 4 * 6144),
        "input": lm(409_290_112 - 48 * 4 * 6144),
        "forget_bias": lm(409_290_112 - 48 * 2 * 4 * 6144),
        "biases": lm(409_290_112 - 48 * 2 * 4 * 6144),
        "forget_input_bias": lm(409_290_112 - 48 * 4 * 6144),
        "gates": lm(409.3),
        "post": lm(430.4),
        "no_conv": lm(408.8),
        "pre": lm(409.3),
    },
}

TRACED = [
    *(
        ("ablations", name)
        for name in ("lstm", "residual", "xlstm_0:1", "xlstm_7:1", "fixed", "post")
    ),
    *(("slimpajama_15b", name) for name in ("llama", "mamba", "rwkv4", "xlstm_1:0")),
    *((name, "") for name in ("parity", "char_lm")),
]
"""Models of other variants differ from one of these only in sizes."""


def experiments() -> list[str]:
    """The files in experiments/ that define a function `config`."""
    names = []
    for path in sorted(FOLDER.glob("*.py")):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == "config" for node in body):
            names.append(path.stem)
    return names


def config(name: str, variant: str) -> Any:
    """The config as `xlstm-jax train` gets it by `--size`."""
    module = importlib.import_module(f"experiments.{name}")
    return module.config(f"paper:{variant}" if variant else "paper")


def test_every_experiment_with_a_config_has_an_entry():
    assert sorted(PAPER) == experiments()


def test_every_variant_has_an_entry():
    assert set(PAPER["ablations"]) - {""} == set(ablations.VARIANTS)
    runs = {*ladder.runs_of("15b"), *ladder.runs_of("300b")}
    assert set(PAPER["ladder"]) - {""} == runs


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_have_the_published_sizes_and_settings(name):
    if not PAPER[name]:
        with pytest.raises(ConfigError, match="size='paper' is unknown"):
            config(name, "")
    for variant, run in PAPER[name].items():
        cfg = config(name, variant)
        count = flops.count_params(cfg.model) + run.second_bias
        count = round(count / 1e6, 1) if isinstance(run.parameters, float) else count
        batch = (cfg.data.batch_size, cfg.data.seq_len)
        assert Run(count, cfg.train.steps, cfg.train.lr, batch, run.second_bias) == run, variant
        if batch[1] == 2048 and name != "scaling_paper":  # the study of arXiv:2405.04517
            assert (cfg.model.dtype, cfg.model.vocab_size) == ("bfloat16", 50304)
            assert not cfg.model.tie_embeddings
            train = cfg.train
            assert (train.b1, train.b2, train.eps, train.weight_decay) == (0.9, 0.95, 1e-5, 0.1)
            assert (train.warmup_steps, train.end_factor, train.grad_clip) == (750, 0.1, 1.0)


def test_published_sizes_of_the_ablations_are_those_of_the_paper():
    printed = {name: one.millions for name, one in ablations.VARIANTS.items() if one.millions}
    ours = {name: PAPER["ablations"][name].parameters for name in printed}
    assert printed == ours


@pytest.mark.slow
@pytest.mark.parametrize("name, variant", TRACED)
def test_one_train_step_of_a_paper_config_can_be_traced(name, variant):
    cfg = config(name, variant)
    model, tx = LM(cfg.model), make_optimizer(cfg.train)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def init(key, tokens):
        return init_state(model, tx, key, tokens, freeze=cfg.train.freeze)

    state = jax.eval_shape(init, jax.random.key(0), tokens)
    B, T = cfg.data.batch_size, cfg.data.seq_len
    ints = jax.ShapeDtypeStruct((B, T), jnp.int32)
    weights = jax.ShapeDtypeStruct((B, T), jnp.float32)
    batch = Batch(ints, ints, ints, weights, jax.ShapeDtypeStruct((B,), jnp.int32))
    after, metrics = jax.eval_shape(make_train_step(model, tx, cfg.train), state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    leaves = jax.tree.leaves(state.params)
    assert sum(leaf.size for leaf in leaves) == flops.count_params(cfg.model)
