"""Evaluator of `train.fit` that samples text."""

import itertools
from typing import Any

from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.generate.sampling import Sampler
from xlstm_jax.generate.text import stream_text
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.modules.lm import LM
from xlstm_jax.train.evaluators import Evaluator
from xlstm_jax.typing import PyTree


def sample_evaluator(
    name: str,
    model: LM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    every: int | None = None,
    characters: int = 300,
    temperature: float = 0.8,
    seed: int = 0,
    **options: Any,
) -> Evaluator:
    """Records `NAME_text`, a continuation of the prompt of about `characters` characters.

    It always draws with the same key, so that texts of different steps compare. With several
    processes it fails, because they would have to decode together. `options` are those of
    `stream_text`.
    """
    options = dict(max_new_tokens=characters) | options

    def evaluate(params: PyTree, step: int) -> dict[str, str]:
        parts = stream_text(
            model,
            {"params": params},
            tokenizer,
            prompt,
            sampler=Sampler(temperature=temperature),
            key=random_key(seed),
            **options,
        )
        text = "".join(itertools.islice(itertools.chain.from_iterable(parts), characters))
        return {"text": prompt + text}

    return Evaluator(name, evaluate, every)
