"""The runs of the scaling study of xLSTM, as a plan: grids, budgets, batches, rates, schedules.

Source: arXiv:2510.02228 and the configurations published with it. The runs need a cluster, 3e23
FLOPs in all. Planning them costs nothing, and any part of the plan can be run:

    xlstm-jax sweep experiments/scaling_paper.py --launch slurm --slurm.nodes 4 ...   # IsoFLOP runs
    xlstm-jax sweep experiments/scaling_paper.py --size ladder ...     # fixed tokens per parameter

The study did not run every combination of its grid: it has 574 IsoFLOP runs, all of which are among
the 700 of this plan. It rounded steps to multiples of 50 to 500, in its later rounds of 200 as
here, and counted FLOPs without rounding feed-forward widths when it chose them. Seven of its runs
have other learning rates than the rules.

`data.source` is a folder of prepared tokens (`xlstm-jax data prepare`) of DCLM-baseline with the
tokenizer of GPT-NeoX: `TOKENS`. The loss of the study is that of the validation split.
"""

import functools
from collections.abc import Mapping

from experiments import record
from xlstm_jax import flops, scaling
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LMConfig, presets
from xlstm_jax.modules.baselines import presets as baselines
from xlstm_jax.scaling import Point, Shape, Sweep
from xlstm_jax.train import ExperimentConfig, TrainConfig

TOKENS = "data/dclm"
CONTEXTS = (2048, 8192, 16384)
BUDGETS = (6e18, 1e19, 3e19, 1e20, 6e20)
TOKENS_PER_BATCH = 2**20  # twice as many at the largest budget
TOKENS_PER_PARAM = (1.0, 1800.0)
"""Training tokens per parameter of the runs of the study, from the fewest to the most."""

LLAMA: Mapping[int, tuple[int, ...]] = {
    512: (10, 12, 14, 16),
    640: (10, 13, 14, 16),
    768: (12, 15, 18),
    896: (12, 15, 18, 21, 24),
    1024: (18, 21, 24, 27, 30),
    **dict.fromkeys((1152, 1280, 1408, 1536, 1792, 2048), (24, 27, 30)),
    2304: (24, 27, 30, 33),
}
MLSTM: Mapping[int, tuple[int, ...]] = {
    512: (10, 12, 14, 16),
    640: (10, 12, 13, 14, 16),
    768: (12, 15, 18),
    896: (12, 15, 18, 21, 24, 27),
    1024: (18, 21, 24, 27, 30),
    **dict.fromkeys((1152, 1280, 1408, 1536, 1792), (24, 27, 30)),
    2048: (24, 27, 33, 36),
    2304: (24, 27, 30, 33),
    2560: (32, 35, 38),
    2816: (30, 32, 34, 36),
    3072: (30, 32, 36),
    3328: (32, 36),
    3584: (32, 36),
    4096: (30, 32),
}
"""Width -> numbers of blocks of the IsoFLOP runs."""

LADDER = {
    "llama": ((768, 12, 12), (1024, 24, 16), (1536, 24, 16), (2048, 24, 16), (2560, 32, 32),
              (4096, 32, 32)),
    "mlstm": tuple(presets.LADDER.values()),
}  # fmt: skip
"""Family -> width, blocks, heads of the runs with a fixed ratio of tokens to parameters."""

RATIOS = (22, 44, 110, 220, 550, 1100, 2200)
MAX_RATIO = {768: 2200, 1024: 1100, 1536: 1100, 2048: 1100, 2560: 220, 4096: 110}
"""Tokens per parameter, and the most that were affordable at each width."""

STEP_MULTIPLE = 200
MIN_STEPS = 1701
"""Fewer would round to less than warm-up and cool-down have."""

TRAIN = TrainConfig(
    steps=10_000,  # replaced by the sweep
    schedule="cosine",
    warmup_steps=750,
    end_factor=0.1,
    cooldown_steps=1000,
    optimizer="adamw",
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    grad_clip=0.5,
    eval_every=2000,
    eval_batches=None,
)


def llama(shape: Shape) -> LMConfig:
    """A Transformer of the study."""
    fields = dict(rotary_base=5e5, cache_size=max(CONTEXTS))
    return baselines.llama(presets.VOCAB_SIZE, *shape, **fields)


def mlstm(shape: Shape) -> LMConfig:
    """An xLSTM of the study."""
    return presets.scaling(*shape)


FAMILIES = {"llama": llama, "mlstm": mlstm}


def shapes() -> dict[str, list[Shape]]:
    """The grid of both families."""
    grids = {"llama": LLAMA, "mlstm": MLSTM}
    return {
        family: [
            Shape(dim, n, num_heads(family, dim)) for dim, depths in grid.items() for n in depths
        ]
        for family, grid in grids.items()
    }


def num_heads(family: str, dim: int) -> int:
    """Heads of a width of the IsoFLOP runs."""
    if family == "llama":
        return dim // (64 if dim <= 1024 else 128)
    return dim // (128 if dim < 1024 or dim in (1152, 1408) else 256)


def batch_size(point: Point) -> int:
    """Sequences of a step: equal numbers of tokens at every length."""
    return (2 if point.budget == 6e20 else 1) * TOKENS_PER_BATCH // point.seq_len


def learning_rate(point: Point) -> float:
    """The peak rate by width, also by batch size for xLSTM."""
    dim = point.shape.dim
    if dim <= 1024:
        return 3e-3
    if point.family == "llama":
        return 1e-3 if dim < 2048 else 8e-4
    if point.budget != 6e20:
        return 2e-3
    rates = {1536: 1e-3, 1792: 9e-4, 2048: 8e-4}
    return rates.get(dim, 1e-3 if dim <= 3072 else 9e-4)


def is_included(point: Point) -> bool:
    """The lengths and families of each budget, and a bounded ratio of tokens to parameters."""
    assert point.budget is not None
    if point.budget >= 1e20 and point.seq_len != 8192:
        return False
    if point.budget == 6e20 and (point.family != "mlstm" or point.shape.dim < 1536):
        return False
    size, per_token = _cost(point.family, point.shape, point.seq_len)
    tokens, (low, high) = point.budget / per_token, TOKENS_PER_PARAM
    return low <= tokens / size <= high and tokens >= MIN_STEPS * TOKENS_PER_BATCH


@functools.cache
def _cost(family: str, shape: Shape, seq_len: int) -> tuple[int, float]:
    """Parameters, and FLOPs of training per token."""
    cfg = FAMILIES[family](shape)
    return flops.count_params(cfg), flops.train_flops(cfg, seq_len) / seq_len


def ladder_batch_size(point: Point) -> int:
    """Sequences of a step at a fixed ratio."""
    dim = point.shape.dim
    return 128 if dim <= 1024 else 256 if dim <= 2048 else 512


def ladder_learning_rate(point: Point) -> float:
    """The peak rate at a fixed ratio: lower for the longest runs of small models."""
    dim, ratio = point.shape.dim, point.tokens_per_param
    assert ratio is not None
    if dim <= 1024:
        longest = {("llama", 768): 1100, ("mlstm", 768): 4400}.get((point.family, dim), 550)
        return 1e-3 if ratio >= longest else 3e-3
    if point.family == "mlstm" and ratio >= 1100:
        return 8e-4 if dim == 1536 else 7e-4
    return {1536: 1e-3, 2048: 8e-4, 2560: 7e-4, 4096: 5e-4}[dim]


def sweep(size: str = "paper") -> Sweep:
    """The IsoFLOP runs ("paper") or those with fixed tokens per parameter ("ladder").

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, ("paper", "ladder"))
    data = DataConfig(source=TOKENS)
    if size == "paper":
        return Sweep(
            families=FAMILIES,
            shapes=shapes(),
            budgets=BUDGETS,
            seq_len=CONTEXTS,
            batch_rule=batch_size,
            lr_rule=learning_rate,
            include=is_included,
            step_multiple=STEP_MULTIPLE,
            data=data,
            train=TRAIN,
        )
    return Sweep(
        families=FAMILIES,
        shapes={family: [Shape(*x) for x in LADDER[family]] for family in FAMILIES},
        tokens_per_param=RATIOS,
        seq_len=8192,
        batch_rule=ladder_batch_size,
        lr_rule=ladder_learning_rate,
        include=lambda point: (point.tokens_per_param or 0) <= MAX_RATIO[point.shape.dim],
        step_multiple=50,
        data=data,
        train=TRAIN,
    )


def config(size: str = "paper") -> ExperimentConfig:
    """The first run of a sweep, as an ordinary run."""
    return scaling.plan(sweep(size))[0].cfg
