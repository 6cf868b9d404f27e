"""Checks of a model config, made when it is built: each error is one line with its way out."""

from collections.abc import Iterable

from xlstm_jax.config import ConfigError


def check_at_least(name: str, value: float, smallest: float) -> None:
    """`value` is `smallest` or more."""
    if value < smallest:
        raise ConfigError(
            f"{name} must be at least {smallest}, got {value}; give it a larger value."
        )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """`value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; use one of: {', '.join(choices)}.")


def check_divides(name: str, divisor: int, width_name: str, width: int) -> None:
    """`divisor` divides `width`."""
    if divisor < 1 or width % divisor:
        near = [n for n in range(1, width + 1) if width % n == 0]
        near = sorted(near, key=lambda n: abs(n - divisor))[:3]
        raise ConfigError(
            f"{name} must divide {width_name}={width}, got {divisor}; "
            f"use for example {', '.join(map(str, sorted(near)))}, or change {width_name}."
        )


def check_rate(name: str, value: float) -> None:
    """`value` is a dropout rate."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be at least 0 and below 1, got {value}; 0 drops nothing.")
