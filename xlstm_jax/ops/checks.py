"""Checks of an op's arguments, made while tracing: each error is one line with its way out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax


def check_shapes(op: str, arrays: Mapping[str, tuple[jax.Array | None, str]]) -> dict[str, int]:
    """The size of every axis, once all arrays agree on it.

    Args:
        op: name of the op, for the message.
        arrays: argument name -> (array or None, its axes as letters, a number for a fixed size).

    Raises:
        ValueError: an array has another number of axes, or two arrays disagree on one.
    """
    sizes: dict[str, int] = {}
    seen: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        letters = axes.split()
        if array.ndim != len(letters):
            raise ValueError(
                f"{op}: `{name}` must have the axes ({axes}), got shape {tuple(array.shape)}."
            )
        for letter, size in zip(letters, array.shape, strict=True):
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                source = "" if letter.isdigit() else f" as in `{seen[letter]}`"
                raise ValueError(
                    f"{op}: `{name}` must have the axes ({axes}) with {letter}={expected}{source}, "
                    f"got shape {tuple(array.shape)}."
                )
            seen.setdefault(letter, name)
    return sizes


def by_name(values: Any, axes: Any, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """The fields of a NamedTuple with their axes, as `check_shapes` takes them."""
    rows = zip(values._fields, values, axes, strict=True)
    return {prefix + name: (value, letters) for name, value, letters in rows}


def check_length(op: str, sizes: Mapping[str, int]) -> None:
    """A sequence has at least one step; an empty one would have no last state."""
    if sizes["T"] < 1:
        raise ValueError(f"{op}: T must be at least 1, got 0; leave out calls without any step.")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{op}: `{name}` must be {known}, got {value!r}.")


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """A chunk has at least one position; None lets the op choose."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"{op}: `chunk_size` must be at least 1, got {chunk_size}; "
            "leave it None to let the op choose."
        )
