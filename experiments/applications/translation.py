"""Translates sequences with a language model whose loss ignores the source, the prefix.

A source of symbols, a separator, and its translation form one sequence: every symbol has a word in
the other alphabet, in the same order. With `--task copy` both alphabets are the same. Positions of
the prefix have weight 0, so that the model is not trained to predict the source. Expected: more
than 0.95 of test sources are translated without an error by greedy decoding.

    python experiments/applications/translation.py                # a minute on two idle cores
"""

import dataclasses
import pathlib
from typing import Any, Literal

import numpy as np

from experiments import record
from experiments.applications import training
from xlstm_jax import cpu
from xlstm_jax.data import Batch
from xlstm_jax.modules import LM, LMConfig, MLSTMConfig

NUM_SYMBOLS, MIN_LEN, MAX_LEN = 16, 3, 8
PAD, SEPARATOR, END, FIRST = 0, 1, 2, 3  # symbols of the source start at FIRST
VOCAB_SIZE = FIRST + 2 * NUM_SYMBOLS
NUM_TEST = 256
BLOCKS = LMConfig(vocab_size=VOCAB_SIZE, dim=32, pattern="mm", mlstm=MLSTMConfig(num_heads=2))
STEPS = {"smoke": 10, "cpu": 400}
WORDS = np.random.default_rng(0).permutation(NUM_SYMBOLS)  # of the symbols, in the other alphabet

Task = Literal["translate", "copy"]


def translate(source: np.ndarray, task: Task) -> np.ndarray:
    """The tokens that follow the separator, without the end."""
    return source if task == "copy" else FIRST + NUM_SYMBOLS + WORDS[source - FIRST]


def sources(seed: int, count: int) -> list[np.ndarray]:
    """Random sources; training and test sources have different seeds."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(MIN_LEN, MAX_LEN + 1, count)
    return [FIRST + rng.integers(0, NUM_SYMBOLS, length) for length in lengths]


def make_batch(texts: list[np.ndarray], task: Task) -> Batch:
    """Source, separator, translation, end; weights are 1 for the translation and its end."""
    tokens = np.full((len(texts), 2 * MAX_LEN + 2), PAD, np.int32)
    is_target = np.zeros(tokens.shape, bool)
    for sequence, mask, source in zip(tokens, is_target, texts, strict=True):
        prefix = len(source) + 1
        sequence[: 2 * prefix] = [*source, SEPARATOR, *translate(source, task), END]
        mask[prefix : 2 * prefix] = True
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=(tokens[:, :-1] != PAD).astype(np.int32),
        weights=is_target[:, 1:].astype(np.float32),
        index=np.arange(len(texts)),
    )


def exact_translations(model: LM, params: Any, task: Task) -> float:
    """The share of test sources that greedy decoding translates without an error."""
    from xlstm_jax.generate import generate

    texts = sources(1, NUM_TEST)
    prompts = [[*map(int, source), SEPARATOR] for source in texts]
    limit = MAX_LEN + 1
    output = generate(model, {"params": params}, prompts, max_new_tokens=limit, stop=(END,))
    expected = [[*map(int, translate(source, task)), END] for source in texts]
    return float(np.mean([a == b for a, b in zip(output.tokens, expected, strict=True)]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains the model and writes one JSON file."""

    size: Literal["smoke", "cpu"] = "cpu"
    task: Task = "translate"
    out: pathlib.Path = record.RESULTS / "applications" / "translation.json"


def main(options: Options) -> int:
    """Runs the application; returns 0 if the expectation holds (smoke: always), else 1."""
    cpu.prepare()

    def random_batch(seed: int, count: int) -> Batch:
        return make_batch(sources(1 + seed, count), options.task)

    model, steps = LM(BLOCKS), STEPS[options.size]
    result = record.start("applications/translation", options.size)
    grid = training.train(model, random_batch, steps)
    exact = exact_translations(model, grid.member(0), options.task)
    print(f"{exact:.3f} of {NUM_TEST} test sources without an error")
    result |= {"task": options.task, "steps": steps, "exact": exact}
    result["outcome"] = {"more than 0.95 translated without an error": exact > 0.95}
    return record.save(result, options.out)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
