"""Patterns of blocks, and their split into runs."""

import random
import time

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.modules import at, ratio_pattern
from xlstm_jax.modules.patterns import Run, find_period, split_runs


def test_ratio_pattern_repeats_mlstm_then_slstm():
    assert ratio_pattern("7:1", 16) == "mmmmmmmsmmmmmmms"
    assert ratio_pattern("1:1", 2) == "ms"
    assert ratio_pattern("1:0", 3) == "mmm"
    assert ratio_pattern("0:1", 2) == "ss"


@pytest.mark.parametrize("ratio", ["7", "7-1", "0:0", "-1:1", ""])
def test_invalid_ratio_is_rejected(ratio):
    with pytest.raises(ConfigError, match="must be two counts"):
        ratio_pattern(ratio, 8)


@pytest.mark.parametrize("num_blocks", [0, 12])
def test_num_blocks_must_be_a_multiple_of_the_ratio(num_blocks):
    with pytest.raises(ConfigError, match=f"multiple of 8 .*got {num_blocks}; .*at()"):
        ratio_pattern("7:1", num_blocks)


def test_at_puts_slstm_blocks_at_the_given_indices():
    assert at(6, slstm=[3, 5]) == "mmmsms"
    assert at(3, slstm=()) == "mmm"


@pytest.mark.parametrize("index", [-1, 6])
def test_index_outside_the_model_is_rejected(index):
    with pytest.raises(ConfigError, match=f"block indices from 0 to 5, got {index}"):
        at(6, slstm=[2, index])


@pytest.mark.parametrize(
    "pattern, runs",
    [
        ("M" * 32, [("M", 32)]),
        ("mmmmmmms" * 8, [("mmmmmmms", 8)]),
        ("ms", [("ms", 1)]),
        ("mms", [("m", 2), ("s", 1)]),
        ("msM", [("msM", 1)]),
        ("mmmmms", [("m", 5), ("s", 1)]),
        (
            at(48, slstm=(3, 5, 7, 40, 42, 44)),
            [("m", 2), ("ms", 3), ("m", 32), ("sm", 3), ("m", 2)],
        ),
        (at(24, slstm=(3, 20)), [("m", 3), ("s", 1), ("m", 16), ("s", 1), ("m", 3)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pattern_is_split_into_long_runs(pattern, runs):
    assert split_runs(pattern) == tuple(Run(unit, (unit,) * repeats) for unit, repeats in runs)


def _fewest_letters(pattern: str) -> int:
    """Exhaustive search over first runs and splits of the remaining suffix."""
    if not pattern:
        return 0
    counts = []
    for size in range(1, len(pattern) + 1):
        suffix = pattern[size:]
        counts.append(size + _fewest_letters(suffix))
        while suffix.startswith(pattern[:size]):
            suffix = suffix[size:]
            counts.append(size + _fewest_letters(suffix))
    return min(counts)


def test_split_compiles_the_fewest_blocks():
    rng = random.Random(0)
    for _ in range(60):
        pattern = "".join(rng.choices("msM", (3, 2, 1), k=rng.randint(1, 9)))
        runs = split_runs(pattern)
        assert "".join(run.pattern for run in runs) == pattern
        assert sum(len(run.unit) for run in runs) == _fewest_letters(pattern)


@pytest.mark.parametrize(
    "pattern, runs",
    [
        ("M" * 10_000, [("M", 10_000)]),
        ("mmmmmmms" * 1250, [("mmmmmmms", 1250)]),
        ("m" + "Ms" * 4000 + "m" * 200, [("m", 1), ("Ms", 4000), ("m", 200)]),
    ],
    ids=["equal", "periodic", "three runs"],
)
def test_a_pattern_of_10000_blocks_is_split_at_once(pattern, runs):
    start = time.process_time()
    assert split_runs(pattern) == tuple(Run(unit, (unit,) * repeats) for unit, repeats in runs)
    assert find_period(pattern).pattern == pattern
    assert time.process_time() - start < 2  # exhaustive search takes 1 s for 256 blocks


def test_a_period_of_many_letters_has_the_order_of_their_first_blocks():
    letters = "zyxwvutsrqponmlkjihgfedcba"
    assert find_period(letters * 2) == Run(letters, (letters, letters))


@pytest.mark.parametrize(
    "pattern, unit, steps",
    [
        ("MMM", "M", "M M M"),
        ("msms", "ms", "ms ms"),
        ("mmsmm", "ms", "m ms m m"),
        ("smmsm", "sm", "sm m sm"),
        ("ssmm", "sm", "s sm m"),
        ("msMmM", "msM", "msM mM"),
    ],
)
def test_period_has_every_letter_once(pattern, unit, steps):
    assert find_period(pattern) == Run(unit, tuple(steps.split()))


def test_period_tells_which_letters_every_step_applies():
    run = find_period("mmsmm")
    assert [run.always_has(letter) for letter in "ms"] == [True, False]
    assert run.num_blocks == 5


def test_steps_of_a_period_concatenate_to_the_pattern():
    rng = random.Random(1)
    for _ in range(60):
        pattern = "".join(rng.choices("msM", (3, 2, 1), k=rng.randint(1, 12)))
        run = find_period(pattern)
        assert run.pattern == pattern
        assert sorted(run.unit) == sorted(set(pattern))
        assert all(step == "".join(x for x in run.unit if x in step) for step in run.steps)
