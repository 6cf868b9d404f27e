"""The longest sequence that a model can evaluate: caches of attention are finite."""

import dataclasses

from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS


def max_length(cfg: LMConfig) -> int | None:
    """Positions that every block sees; None if no block has a limit, as in xLSTM."""
    return min(_limits(cfg).values(), default=None)


def check_length(cfg: LMConfig, name: str, length: int) -> None:
    """Raises ArgumentError unless every block sees all positions of a sequence of this length.

    A longer one would be evaluated by another model: one with a sliding window.
    """
    for field, limit in _limits(cfg).items():
        if length > limit:
            raise ArgumentError(
                f"{name} must be at most model.{field}.cache_size={limit}, the positions that its "
                f"attention sees, got {length}; shorten it, or enlarge the cache "
                "(`evaluate --cache-size`)."
            )


def with_cache_size(cfg: LMConfig, cache_size: int) -> LMConfig:
    """The config with attention caches of another size; it has the same parameters."""
    caches = {
        name: dataclasses.replace(getattr(cfg, name), cache_size=cache_size)
        for name in _limits(cfg)
        if hasattr(cfg, name)  # not a kind of the user's
    }
    return dataclasses.replace(cfg, **caches)


def _limits(cfg: LMConfig) -> dict[str, int]:
    limits = {
        BLOCKS[letter].name: getattr(cfg.options_of(letter), "max_length", None)
        for letter in dict.fromkeys(cfg.pattern)
    }
    return {name: limit for name, limit in limits.items() if limit is not None}
