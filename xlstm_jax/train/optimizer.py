"""The optimizers of `TrainConfig.optimizer`, with weight decay and rates by parameter path."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.config import ConfigError
from xlstm_jax.errors import quote
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.train.averages import schedule_free
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.muon import scale_by_muon
from xlstm_jax.train.schedules import Schedule, make_schedule, scale_by_learning_rate
from xlstm_jax.typing import Array, Float, PyTree

_ADAM = ("b1", "b2", "eps")
_DECAY = ("weight_decay", "decay_pattern")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One optimizer; all have clipping, a schedule and `lr_factors`.

    Attributes:
        scale: TrainConfig -> transformation from gradients to updates before weight decay and
            learning rate.
        reads: which of `OPTIONS` it depends on. Without "weight_decay" parameters do not decay.
        after_decay: transformation of updates that include weight decay.
        schedule_free: parameters are averaged, instead of momentum.
    """

    scale: Callable[[TrainConfig], optax.GradientTransformation]
    reads: tuple[str, ...]
    after_decay: optax.GradientTransformation | None = None
    schedule_free: bool = False


def per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a stateless transformation to each of the stacked layers separately."""

    def alone(update, param):
        return tx.update(update, tx.init(param), param)[0]

    def of_leaf(path, update, param):
        is_stacked = re.search(r"(^|/)stack/", path_name(path))
        return (jax.vmap(alone) if is_stacked else alone)(update, param)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(of_leaf, updates, params))


def _adam(cfg: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)


def _adafactor(cfg: TrainConfig) -> optax.GradientTransformation:
    """Without momentum; `lr` is relative to the root mean square of each parameter."""
    rest = optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())
    return optax.chain(optax.scale_by_factored_rms(), per_layer(rest))


def _ademamix(cfg: TrainConfig) -> optax.GradientTransformation:
    """The slow average, b3 = 0.9999, gains its weight of 6 and its half-life over all steps."""
    b3 = 0.9999

    def slow_decay(step):
        log_b1, log_b3 = math.log(max(cfg.b1, 0.1)), math.log(b3)  # b1 may be 0
        done = jnp.minimum(step / cfg.steps, 1.0)
        return jnp.exp(log_b1 * log_b3 / ((1 - done) * log_b3 + done * log_b1))

    alpha = optax.linear_schedule(0.0, 6.0, cfg.steps)
    return optax.contrib.scale_by_ademamix(cfg.b1, cfg.b2, slow_decay, alpha, cfg.eps)


OPTIMIZERS: dict[str, Optimizer] = {
    # Loshchilov and Hutter 2019, arXiv:1711.05101
    "adamw": Optimizer(_adam, _ADAM + _DECAY),
    # Kingma and Ba 2015, arXiv:1412.6980
    "adam": Optimizer(_adam, _ADAM),
    # Dozat 2016: Adam with Nesterov momentum; with decoupled weight decay
    "nadamw": Optimizer(
        lambda cfg: optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, nesterov=True), _ADAM + _DECAY
    ),
    # Chen et al. 2023, arXiv:2302.06675; takes about a tenth of the rate of AdamW
    "lion": Optimizer(lambda cfg: optax.scale_by_lion(cfg.b1, cfg.b2), ("b1", "b2", *_DECAY)),
    # Shazeer and Stern 2018, arXiv:1804.04235
    "adafactor": Optimizer(_adafactor, _DECAY),
    # You et al. 2020, arXiv:1904.00962
    "lamb": Optimizer(_adam, _ADAM + _DECAY, per_layer(optax.scale_by_trust_ratio())),
    # Polyak 1964, heavy-ball momentum
    "sgd": Optimizer(lambda cfg: optax.trace(cfg.momentum), ("momentum",)),
    # Pagliardini et al. 2024, arXiv:2409.03137
    "ademamix": Optimizer(_ademamix, _ADAM + _DECAY),
    # Taniguchi et al. 2024, arXiv:2411.02853
    "adopt": Optimizer(
        lambda cfg: optax.contrib.scale_by_adopt(cfg.b1, cfg.b2, cfg.eps), _ADAM + _DECAY
    ),
    # Defazio et al. 2024, arXiv:2405.15682; b1 interpolates parameters
    "schedule_free_adamw": Optimizer(
        lambda cfg: optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False, bias_correction=True),
        _ADAM + _DECAY,
        schedule_free=True,
    ),
    # Jordan 2024, kellerjordan.github.io/posts/muon; momentum of matrices, b1 and b2 of the others
    "muon": Optimizer(scale_by_muon, ("momentum", *_ADAM, *_DECAY)),
}
"""`TrainConfig.optimizer` -> its record; all transformations are of optax."""

OPTIONS = ("b1", "b2", "eps", "momentum", "weight_decay", "decay_pattern")
"""Fields of `TrainConfig` that only some optimizers read."""


def check_options(cfg: TrainConfig) -> None:
    """Raises ConfigError if the optimizer does not depend on an option that is set."""
    for name in OPTIONS:
        value, default = getattr(cfg, name), getattr(TrainConfig, name)
        is_off = name == "weight_decay" and value == 0
        if name in OPTIMIZERS[cfg.optimizer].reads or value == default or is_off:
            continue
        readers = [other for other, record in OPTIMIZERS.items() if name in record.reads]
        raise ConfigError(
            f"train.{name}={quote(value)} has no effect with train.optimizer={cfg.optimizer!r}; "
            f"leave it at {default!r}, or use one of: {', '.join(readers)}."
        )
    if OPTIMIZERS[cfg.optimizer].schedule_free and cfg.b1 == 0:
        raise ConfigError(
            f"train.b1 must be above 0 with train.optimizer={cfg.optimizer!r}, got 0.0; "
            "the default is 0.9."
        )


def weight_decay_of(cfg: TrainConfig) -> float:
    """The weight decay that the optimizer applies; 0 if it has none."""
    return cfg.weight_decay if "weight_decay" in OPTIMIZERS[cfg.optimizer].reads else 0.0


def decay_mask(params: PyTree, pattern: str = TrainConfig.decay_pattern) -> PyTree:
    """A tree of flags: whether a parameter decays, which is whether `pattern` is in its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(pattern, path_name(path)) is not None, params
    )


def lr_factor_of(params: PyTree, cfg: TrainConfig) -> PyTree:
    """A tree of the factors of `cfg.lr_factors`: of the first regex in the path, or else 1.

    Raises:
        ConfigError: a regex is the first match of no parameter.
    """
    unused = {pattern for pattern, _ in cfg.lr_factors}

    def of_path(path, _):
        for pattern, factor in cfg.lr_factors:
            if re.search(pattern, path_name(path)):
                unused.discard(pattern)
                return factor
        return 1.0

    factors = jax.tree.map_with_path(of_path, params)
    if unused:
        pattern = min(unused)
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        near = ", ".join(difflib.get_close_matches(pattern, paths, cutoff=0.0))
        raise ConfigError(
            f"train.lr_factors must have regexes that are the first match of some parameter, got "
            f"{quote(pattern)}; the nearest paths are {near}."
        )
    return factors


def scale_by_lr_factors(cfg: TrainConfig) -> optax.GradientTransformation:
    """Scales updates by `lr_factor_of`, which `init` checks."""

    def init(params):
        lr_factor_of(params, cfg)
        return optax.EmptyState()

    def update(updates, state, params=None):
        factors = lr_factor_of(updates, cfg)
        return jax.tree.map(lambda u, factor: u * factor, updates, factors), state

    return optax.GradientTransformation(init, update)


class ScheduledOptimizer(optax.GradientTransformationExtraArgs):
    """An optimizer with the `schedule` that it follows, so that train steps can report the rate."""

    schedule: Schedule

    def __new__(cls, tx: optax.GradientTransformationExtraArgs, schedule: Schedule):
        self = super().__new__(cls, *tx)
        self.schedule = schedule
        return self


def make_optimizer(cfg: TrainConfig) -> ScheduledOptimizer:
    """The optimizer `cfg.optimizer`: clipping by global norm, its updates, decoupled weight decay,
    learning rate, `lr_factors`.

    `update` takes `step`, the argument of the schedule, and `lr_scale`, a factor on the learning
    rate. Both may be traced, so one program serves a vmapped grid of learning rates.

    Raises:
        ConfigError: an option is set that this optimizer does not read.
    """
    check_options(cfg)
    record, schedule = OPTIMIZERS[cfg.optimizer], make_schedule(cfg)
    parts = [record.scale(cfg)]
    if "weight_decay" in record.reads:
        mask = lambda params: decay_mask(params, cfg.decay_pattern)  # noqa: E731
        parts.append(optax.add_decayed_weights(cfg.weight_decay, mask=mask))
    if record.after_decay is not None:
        parts.append(record.after_decay)
    parts.append(scale_by_learning_rate(schedule))
    if cfg.lr_factors:
        parts.append(scale_by_lr_factors(cfg))
    if record.schedule_free:
        # The average of parameters that do not change is rounded, which must not change them.
        untrained = lambda params: jax.tree.map(lambda f: f == 0, lr_factor_of(params, cfg))  # noqa: E731
        parts = [
            schedule_free(optax.chain(*parts), schedule, cfg.b1),
            optax.masked(optax.set_to_zero(), untrained),
        ]
    clip = optax.identity() if cfg.grad_clip is None else optax.clip_by_global_norm(cfg.grad_clip)
    return ScheduledOptimizer(optax.chain(clip, *parts), schedule)


def norm(tree: PyTree) -> Float[Array, ""]:
    """Global norm: the square root of the sum of squares of all leaves, in float32 or wider."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(state_dtype(x)), tree))
