"""A model for the EleutherAI evaluation harness: `lm_eval.simple_evaluate(model=XLSTM(...))`.

Tokens, truncation and the windows of rolling log-likelihoods are those of the harness's own backend
for `transformers`, so that the results of a checkpoint agree.
"""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.config import check_range
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, ConfigError, import_optional, quote
from xlstm_jax.evaluate.lengths import check_length, max_length
from xlstm_jax.evaluate.scoring import TokenSequence, score_sequences, windows_of_document
from xlstm_jax.generate import Sampler, greedy, prepare_params, stream
from xlstm_jax.generate.arguments import check_tokenizer
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.modules.lm import LM

INSTALL = "xlstm-jax[eval]"

TemplateLM: Any = import_optional(
    "lm_eval.api.model", "the evaluation harness", install=INSTALL, package="lm-eval"
).TemplateLM

MAX_NEW_TOKENS = 256
"""Limit of a generation whose task sets none, as in the harness."""

_PIECE = 16  # tokens between two searches for stop strings

_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OPTIONS = (*_TOKEN_LIMITS, "until", "do_sample", "temperature", "top_k", "top_p")


class XLSTM(TemplateLM):
    """An `lm_eval.api.model.LM`: log-likelihoods, rolling log-likelihoods and generation.

    Args:
        model, variables, tokenizer: as in training.
        batch_size: sequences per forward pass; affects only speed and memory.
        max_length: tokens that a prediction sees, and of the windows of rolling log-likelihoods.
            None: the attention caches, or no limit without them; the state carries full documents.
        prefix_token_id: the token before a text without context; None: that which ends documents.
        seed: of generation that samples.

    Raises:
        ArgumentError: a size is below 1, or exceeds the attention cache or vocabulary of the model.
    """

    def __init__(
        self,
        model: LM,
        variables: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        check_range("batch_size", batch_size, "at least 1")
        check_range("max_length", max_length, "at least 1", "leave it out")
        if max_length is not None:
            check_length(model.cfg, "max_length", max_length)
        check_tokenizer(tokenizer, model.cfg.vocab_size)
        self._model, self._variables, self._tokenizer = model, variables, tokenizer
        self._max_length, self._prefix, self._seed = max_length, prefix_token_id, seed
        self.batch_size = batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.eot_token_id if self._prefix is None else self._prefix

    @property
    def max_length(self) -> int | None:
        """Tokens that a prediction sees; None: all."""
        return max_length(self._model.cfg) if self._max_length is None else self._max_length

    @property
    def tokenizer_name(self) -> str:
        """A key of cached requests."""
        return f"{self._tokenizer.name}-{self._tokenizer.sha256[:16]}"

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(string).tolist()
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        sequences = [self._sequence(*request) for request in requests]
        scores = score_sequences(
            self._model, self._variables, sequences, batch_size=self.batch_size
        )
        results = [(score.logprob, score.is_greedy) for score in scores]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def _sequence(self, key: Any, context: list[int], continuation: list[int]) -> TokenSequence:
        if not continuation:
            raise ArgumentError(
                f"continuations of a task must add a token to their context, got {quote(key)}; the "
                "tokenizer merges it with the end of the context: move the boundary."
            )
        ids = np.array([*(context or [self.prefix_token_id]), *continuation], np.int64)
        limit = self.max_length
        # As in the harness, the oldest tokens are dropped.
        ids = ids if limit is None else ids[-(limit + 1) :]
        return TokenSequence(ids, min(len(continuation), len(ids) - 1))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-likelihood of every text, in windows in which each token is scored once."""
        texts = [request.args[0] for request in requests]
        windows_of_texts = [
            list(windows_of_document(np.array(ids), self.prefix_token_id, self.max_length))
            for ids in map(self.tok_encode, texts)
        ]
        windows = list(itertools.chain.from_iterable(windows_of_texts))
        scores = iter(
            score_sequences(self._model, self._variables, windows, batch_size=self.batch_size)
        )
        results = [sum(next(scores).logprob for _ in windows) for windows in windows_of_texts]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Continuations of contexts up to a stop string of their task, which is left out."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        prompts = [
            self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests
        ]
        # Of all tasks before the first answer, so that an invalid one costs no time.
        options_of = {
            name: self._checked(generation_options(requests[indices[0]].args[1]))
            for name, indices in groups.items()
        }
        results: dict[int, str] = {}
        for name, indices in groups.items():
            options = options_of[name]
            indices.sort(key=lambda i: -len(prompts[i]))
            for first in range(0, len(indices), self.batch_size):
                batch = indices[first : first + self.batch_size]
                texts = self._generate([prompts[i] for i in batch], batch, **options)
                results |= zip(batch, texts, strict=True)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, results[i])
        return [results[i] for i in range(len(requests))]

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a task; raises ConfigError if its new tokens do not fit."""
        new = options["max_new_tokens"]
        if self.max_length is not None and new >= self.max_length:
            raise ConfigError(
                f"the {new} new tokens of a task must be fewer than the {self.max_length} that the "
                "attention of the model sees; lower max_gen_toks in generation_kwargs of the task."
            )
        return options

    def _generate(
        self,
        prompts: list[list[int]],
        indices: list[int],
        max_new_tokens: int,
        until: list[str],
        sampler: Any,
    ) -> Iterator[str]:
        if self.max_length is not None:
            prompts = [ids[-(self.max_length - max_new_tokens) :] for ids in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        padding = self.batch_size - len(prompts)
        pieces = stream(
            self._model,
            self._prepared,
            # Short batches are padded, so that all have one compiled program.
            [*prompts, *([self.prefix_token_id] for _ in range(padding))],
            max_new_tokens=max_new_tokens,
            piece=_PIECE,
            sampler=sampler,
            # A key of its own for each request: a task may repeat one to draw several answers.
            key=jax.vmap(jax.random.fold_in, (None, 0))(
                random_key(self._seed), jnp.array([*indices, *[0] * padding])
            ),
            stop=[self.eot_token_id],
            with_state=False,
        )
        for piece in pieces:
            for ids, new in zip(tokens, piece.tokens, strict=False):
                ids += new
            texts = [self._text(ids) for ids in tokens]
            if all(
                self.eot_token_id in ids or any(s in text for s in until)
                for ids, text in zip(tokens, texts, strict=True)
            ):
                break
        for ids in tokens:
            text = self._text(ids)
            for stop in until:
                text = text.split(stop)[0]
            yield text

    @functools.cached_property
    def _prepared(self) -> Any:
        return prepare_params(self._model, self._variables)

    def _text(self, ids: list[int]) -> str:
        # Ids that only pad the vocabulary of the model have no text.
        return self._tokenizer.decode([i for i in ids if i < self._tokenizer.vocab_size])


def generation_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `XLSTM._generate` from the `generation_kwargs` of a task.

    Raises:
        ConfigError: an option is not supported.
    """
    for name, value in kwargs.items():
        # Beam search with one beam is none.
        if name not in _OPTIONS and (name, value) != ("num_beams", 1):
            raise ConfigError(
                f"generation_kwargs.{name}={quote(value)} of a task is not supported; use "
                f"{', '.join(_OPTIONS)}."
            )
    limits = [kwargs[name] for name in _TOKEN_LIMITS if kwargs.get(name) is not None]
    max_new_tokens = int(limits[0]) if limits else MAX_NEW_TOKENS
    check_range("max_gen_toks", max_new_tokens, "at least 1", "correct the task")
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    temperature = float(kwargs.get("temperature") or 0.0)
    samples = kwargs.get("do_sample", temperature > 0)
    sampler: Any = greedy
    if samples and temperature <= 0:
        raise ConfigError(
            f"generation_kwargs.temperature must be above 0 with do_sample, got {temperature}; set "
            "it, or do_sample to false."
        )
    if samples:
        top_k, top_p = kwargs.get("top_k"), kwargs.get("top_p")
        sampler = Sampler(temperature=temperature, top_k=top_k or None, top_p=top_p)
    return {
        "max_new_tokens": max_new_tokens,
        "until": [stop for stop in until if stop],
        "sampler": sampler,
    }
