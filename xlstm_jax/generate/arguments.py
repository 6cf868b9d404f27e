"""Arguments of generation: prompts, token ids and keys, checked before anything is compiled."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, Key

from xlstm_jax.config import ConfigError
from xlstm_jax.data.tokenizers import Tokenizer
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.generate.sampling import Sampler, check_never
from xlstm_jax.typing import Array, PRNGKeyArray

Prompts = (
    Sequence[Sequence[int] | Integer[Array | np.ndarray, "T"]] | Integer[Array | np.ndarray, "B T"]
)
AnyKey = PRNGKeyArray | Key[Array, "keys"]


def sequence_keys(key: AnyKey, batch_size: int) -> Key[Array, "B"]:
    """A key for every sequence, from a single key or one per prompt."""
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a legacy uint32 key
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ConfigError(
            f"key must be a single key or have the shape ({batch_size},), got {key.shape}; "
            "pass a single key to derive one per prompt."
        )
    return key


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raises ArgumentError unless it is a tokenizer with at most as many ids as a model."""
    if not isinstance(tokenizer, Tokenizer):
        raise ArgumentError(
            f"tokenizer must be a tokenizer, got {quote(tokenizer)}; load it with "
            "`xlstm_jax.data.tokenizers.get`."
        )
    if tokenizer.vocab_size > vocab_size:
        raise ArgumentError(
            f"tokenizer must have at most {vocab_size} ids, the vocabulary of the model, got "
            f"{tokenizer.vocab_size}; use the tokenizer of the model."
        )


def check_sampler(sampler: Any, vocab_size: int) -> None:
    """Raises ArgumentError unless a sampler can be compiled for this vocabulary."""
    if not callable(sampler) or not isinstance(sampler, Hashable):
        raise ArgumentError(
            "sampler must be a hashable function (logits, key, seen) -> token, got "
            f"{quote(sampler)}; use `greedy`, a `Sampler`, or a frozen dataclass."
        )
    if isinstance(sampler, Sampler):
        check_never(sampler.never, vocab_size)


def prompt_ids(prompts: Prompts, vocab_size: int) -> list[np.ndarray]:
    """The token ids of each prompt, checked."""
    if len(prompts) == 0:
        raise ArgumentError("prompts must have at least one list of token ids, got none; add one.")
    return [token_ids(ids, f"prompts[{i}]", vocab_size) for i, ids in enumerate(prompts)]


def token_ids(ids: Any, name: str, vocab_size: int) -> np.ndarray:
    """Token ids as an int32 array; `name` names them in errors."""
    try:
        array = np.asarray(ids)
    except ValueError:  # nested lists of different lengths
        array = np.zeros(())
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ArgumentError(
            f"{name} must be a list of at least one token id, integers, got {quote(ids)}; encode "
            "the text with the tokenizer of the model."
        )
    invalid = np.flatnonzero((array < 0) | (array >= vocab_size))
    if invalid.size:
        raise ArgumentError(
            f"{name} must have token ids from 0 to {vocab_size - 1}, got {array[invalid[0]]} at "
            f"position {invalid[0]}; encode it with the tokenizer of the model."
        )
    return array.astype(np.int32)
