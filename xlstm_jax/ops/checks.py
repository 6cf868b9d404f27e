"""Argument checks of ops, made at trace time; each error is one line and names a fix."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from xlstm_jax.errors import ArgumentError
from xlstm_jax.typing import Size


def check_shapes(op: str, arrays: Mapping[str, tuple[jax.Array | None, str]]) -> dict[str, Size]:
    """Checks that all arrays agree on the size of every axis, and returns the sizes.

    Args:
        op: name of the op, for the message.
        arrays: argument name -> (array or None, its axes as letters, a number for a fixed size).

    Raises:
        ValueError: an array has another number of axes, or two arrays disagree on a size.
    """
    sizes: dict[str, Size] = {}
    first_use: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        letters = axes.split()
        if array.ndim != len(letters):
            raise ArgumentError(
                f"{op}: `{name}` must have the axes ({axes}), got shape {tuple(array.shape)}."
            )
        for letter, size in zip(letters, array.shape, strict=True):
            # The first array with a letter defines its size; the message names that array.
            expected = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if size != expected:
                source = "" if letter.isdigit() else f" as in `{first_use[letter]}`"
                raise ArgumentError(
                    f"{op}: `{name}` must have the axes ({axes}) with {letter}={expected}{source}, "
                    f"got shape {tuple(array.shape)}."
                )
            first_use.setdefault(letter, name)
    return sizes


def fields_with_axes(values: Any, axes: Any, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """The fields of a NamedTuple with their axes, in the format of `check_shapes`."""
    fields = zip(values._fields, values, axes, strict=True)
    return {prefix + name: (value, letters) for name, value, letters in fields}


def check_length(op: str, sizes: Mapping[str, Size]) -> None:
    """Raises ValueError if a sequence has no step."""
    if sizes["T"] < 1:
        raise ArgumentError(
            f"{op}: T must be at least 1, got 0; skip the call for empty sequences."
        )


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{op}: `{name}` must be {known}, got {value!r}.")


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    """Raises ValueError if `chunk_size` is below 1; None lets the op choose."""
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(
            f"{op}: `chunk_size` must be at least 1, got {chunk_size}; "
            "leave it None to let the op choose."
        )
