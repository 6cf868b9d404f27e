"""The record of a synthetic task: what it generates, its options, and their bounds."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.config.fields import MAX_INT, as_type, did_you_mean
from xlstm_jax.errors import ConfigError, quote, quote_path

PAD = 0
"""Token id of padding, and of answers in the inputs."""

Options = Mapping[str, Any]
"""The options of a task by name, complete and checked."""


class Sequences(NamedTuple):
    """Generated samples, padded on the right with `PAD` to L tokens."""

    tokens: Int[np.ndarray, "N L"]  # questions with their answers
    is_answer: Bool[np.ndarray, "N L"]
    lengths: Int64[np.ndarray, "N"]  # tokens of each sample, with the answer


class Option(NamedTuple):
    """A default, whose type all values have, and the smallest value; others may determine it."""

    default: bool | int | float
    at_least: int | float | Callable[[Options], int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticTask:
    """A task of questions and answers. An entry of `registry.TASKS` makes it a data set.

    Attributes:
        name: the name of the data set.
        category: of the language: regular, context-free, context-sensitive; or what it needs.
        options: name -> default and bound of the entries of `DataConfig.task`.
        generate: (one key per sample, most tokens per sample, L, options) -> samples. A sample is
            a function of its key, its number of tokens and the options: not of L, which is at least
            every number of tokens.
        chance: options -> accuracy of guessing, the zero of the scaled accuracy.
        vocab_size: options -> number of token ids, `PAD` included.
        min_len: options -> tokens of the shortest sample, with its answer.
        odd_lengths: the numbers of tokens are odd: uniform over those from min_len (or one less)
            to max_len.
    """

    name: str
    category: str
    options: Mapping[str, Option]
    generate: Callable[
        [UInt64[np.ndarray, "N"], Int64[np.ndarray, "N"], int, Options],
        Sequences,
    ]
    chance: Callable[[Options], float]
    vocab_size: Callable[[Options], int] = operator.itemgetter("vocab_size")
    min_len: Callable[[Options], int] = lambda options: 2
    odd_lengths: bool = False

    def complete(self, values: Options) -> dict[str, Any]:
        """All options, with defaults for those that `values` leaves out.

        Raises:
            ConfigError: an option is unknown, has another type than its default or is too small.
        """
        for name in values:
            if name not in self.options:
                hint = did_you_mean(name, self.options) if self.options else "leave it out."
                raise ConfigError(
                    f"{quote_path(f'data.task.{name}')} is not an option of the task {self.name}; "
                    f"{hint}"
                )
        defaults = {name: option.default for name, option in self.options.items()}
        options = {
            name: as_type(type(default), values.get(name, default), f"data.task.{name}")
            for name, default in defaults.items()
        }
        for name, option in self.options.items():
            _check_bound(f"data.task.{name}", options[name], option, options)
        return options

    def check_min_len(self, min_len: int, options: Options) -> None:
        """Raises ConfigError if samples of `min_len` tokens cannot hold the task."""
        least = self.min_len(options)
        if min_len < least:
            raise ConfigError(
                f"data.min_len must be at least {least}, the shortest sample of the task "
                f"{self.name}, got {min_len}; set data.min_len={least}."
            )


def _check_bound(name: str, value: Any, option: Option, options: Options) -> None:
    least = option.at_least(options) if callable(option.at_least) else option.at_least
    if least is not None and value < least:
        others = ", ".join(f"{key}={options[key]}" for key in options if not name.endswith(key))
        other = f" with {others}" if callable(option.at_least) and others else ""
        raise ConfigError(
            f"{name} must be at least {least}{other}, got {quote(value)}; set {name}={least}."
        )
    if isinstance(value, int) and value > MAX_INT:
        raise ConfigError(f"{name} must be at most {MAX_INT}, got {quote(value)}; lower it.")
