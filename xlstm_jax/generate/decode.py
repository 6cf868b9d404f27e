"""Batched generation: a chunked prefill, then a jitted loop that decodes one token per iteration.

The recurrent state has a fixed size, so each token costs the same at any context length, and the
state after a prompt can be stored and resumed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, Key

from xlstm_jax.config import MAX_INT, ConfigError, as_type, check_range
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.generate.sampling import greedy
from xlstm_jax.modules.lm import LM, lm_logits
from xlstm_jax.modules.stack import check_stack_state
from xlstm_jax.typing import Array, Bool, Float, Int, PRNGKeyArray

PREFILL_WIDTHS = (512, 128, 16)
"""Positions in one prefill pass, each a compiled program: few, because compiling takes seconds. The
largest bounds memory."""

# (logits, key, seen) -> token, without a batch axis. It is a static argument of jit: it must be
# hashable, and equal samplers share a compiled program.
SamplerFn = Callable[..., Int[Array, ""]]
State = Any  # of the model
Prompts = (
    Sequence[Sequence[int] | Integer[Array | np.ndarray, "T"]] | Integer[Array | np.ndarray, "B T"]
)
AnyKey = PRNGKeyArray | Key[Array, "keys"]


class Generation(NamedTuple):
    """Generated tokens, and the state after the last token of each sequence."""

    tokens: list[list[int]]  # per prompt; a stop token is included
    state: State  # after prompt and generated tokens; pass it with the next prompts


class _DecodeState(NamedTuple):
    """Carry of the decoding loop."""

    state: State  # after all tokens so far
    logits: Float[Array, "B vocab"]  # of the next token
    seen: Bool[Array, "B vocab"]  # tokens in the prompt or generated so far
    length: Int[Array, "B"]  # number of generated tokens
    done: Bool[Array, "B"]  # a stop token was generated


def generate(
    model: LM,
    variables: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampler: SamplerFn = greedy,
    key: AnyKey | None = None,
    state: State | None = None,
    stop: Sequence[int] = (),
) -> Generation:
    """Continues prompts of any lengths, in one batch.

    A result does not depend on the other prompts: padding is masked and leaves the state unchanged,
    and each sequence is sampled with its own key.

    Args:
        prompts: token ids, at least one per prompt: lists of any lengths, or an array.
        max_new_tokens: limit per sequence, a stop token included; 0 only prefills.
        sampler: `greedy`, a `Sampler`, or a hashable (logits, key, seen) -> token, without batch.
        key: sequence i uses `fold_in(key, i)`; or B keys, one per prompt. Not used by `greedy`.
        state: to start from, returned by `generate` or `model.apply`; None: the initial state.
        stop: token ids that end a sequence.

    Raises:
        ArgumentError: an argument is invalid.
    """
    options: dict[str, Any] = dict(sampler=sampler, key=key, state=state, stop=stop)
    return next(stream(model, variables, prompts, max_new_tokens=max_new_tokens, **options))


def stream(
    model: LM,
    variables: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    piece: int | None = None,
    sampler: SamplerFn = greedy,
    key: AnyKey | None = None,
    state: State | None = None,
    stop: Sequence[int] = (),
) -> Iterator[Generation]:
    """As `generate`, but yields `piece` tokens at a time (None: all) with the state after them.

    Arguments are checked and prompts prefilled before the first `next`.
    """
    max_new_tokens = as_type(int, max_new_tokens, "max_new_tokens")
    check_range("max_new_tokens", max_new_tokens, "at least 0", "0 only computes the state")
    num_at_once: int = max(max_new_tokens, 1) if piece is None else as_type(int, piece, "piece")
    check_range("piece", num_at_once, "at least 1", "leave it out to get all tokens at once")
    if key is None and sampler is not greedy:
        raise ConfigError(
            "key must be a PRNG key unless the sampler is greedy, got None; "
            "pass jax.random.key(seed), or sampler=greedy."
        )
    ids = _prompt_ids(prompts, model.cfg.vocab_size)
    # A stop token outside of the vocabulary, such as that of a larger tokenizer, never occurs.
    stop_ids = _token_ids(list(stop), "stop", MAX_INT) if len(stop) else np.zeros(0, np.int32)
    keys = _sequence_keys(jax.random.key(0) if key is None else key, len(ids))
    carry = prefill(model, variables, ids, state)
    decode = functools.partial(
        _decode,
        model,
        variables,
        keys=keys,
        stop=jnp.asarray(stop_ids),
        sampler=sampler,
        # A static shape: powers of two bound the number of compiled programs.
        capacity=_power_of_two(num_at_once),
    )

    def pieces(carry: _DecodeState) -> Iterator[Generation]:
        num_tokens = 0
        while True:
            before = carry.length
            carry, tokens = decode(carry, limit=min(num_at_once, max_new_tokens - num_tokens))
            # A sequence that stopped earlier has fewer valid tokens in the buffer.
            lengths = np.asarray(carry.length - before)
            sequences = zip(np.asarray(tokens).tolist(), lengths, strict=True)
            yield Generation([ids[:length] for ids, length in sequences], carry.state)
            num_tokens += num_at_once
            if num_tokens >= max_new_tokens or bool(carry.done.all()):
                return

    return pieces(carry)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def prefill(
    model: LM, variables: Any, prompts: Sequence[np.ndarray], state: State | None
) -> _DecodeState:
    """Runs the model over the prompts in passes of `PREFILL_WIDTHS` positions.

    Prompts are padded on the right, so that the chunk boundaries of a prompt do not depend on the
    other prompts of the batch.
    """
    batch_size, vocab_size = len(prompts), model.cfg.vocab_size
    check_stack_state(model.cfg, state, batch_size)
    if state is None:
        state = model.init_state(batch_size)
    lengths = np.array([len(prompt) for prompt in prompts])
    start, total = 0, int(lengths.max())
    # Room for the last pass, which may be wider than what is left of the prompts.
    tokens = np.zeros((batch_size, total + max(PREFILL_WIDTHS)), np.int32)
    seen = np.zeros((batch_size, vocab_size), bool)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
        seen[i, prompt] = True
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    logits = jnp.zeros((batch_size, vocab_size), jnp.float32)
    while start < total:
        # The widest pass that is more than half full, else the narrowest.
        wide = [width for width in PREFILL_WIDTHS if width < 2 * (total - start)]
        width = max(wide, default=min(PREFILL_WIDTHS))
        chunk = np.s_[:, start : start + width]
        logits, state = _prefill_chunk(model, variables, tokens[chunk], mask[chunk], state, logits)
        start += width
    return _DecodeState(
        state=state,
        logits=logits,
        seen=jnp.asarray(seen),
        length=jnp.zeros(batch_size, jnp.int32),
        done=jnp.zeros(batch_size, bool),
    )


@functools.partial(jax.jit, static_argnames="model")
def _prefill_chunk(
    model: LM,
    variables: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    state: State,
    logits: Float[Array, "B vocab"],
) -> tuple[Float[Array, "B vocab"], State]:
    """The logits after the last token of each sequence, and the state.

    A sequence without tokens in this chunk keeps its previous `logits`. The head is applied to one
    position per sequence: the logits of all positions may need more memory than the model.
    """
    hidden, state = model.apply(variables, tokens, state=state, mask=mask, head=False)
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    new_logits = lm_logits(model.cfg, variables["params"], x)
    return jnp.where(mask.any(axis=1)[:, None], new_logits, logits), state


@functools.partial(jax.jit, static_argnames=("model", "sampler", "capacity"))
def _decode(
    model: LM,
    variables: Any,
    carry: _DecodeState,
    *,
    keys: Key[Array, "B"],
    stop: Int[Array, "stop"],
    limit: Int[Array, ""] | int,
    sampler: SamplerFn,
    capacity: int,
) -> tuple[_DecodeState, Int[Array, "B capacity"]]:
    """Generates up to `limit` tokens per sequence, fewer if all sequences are done.

    `limit` is dynamic and `capacity`, the width of the token buffer, static.
    """

    def unfinished(loop):
        step, carry, _ = loop
        return (step < limit) & ~carry.done.all()

    def body(loop):
        step, carry, tokens = loop
        active = ~carry.done
        # Folding in the length makes samples independent of when other sequences stop.
        step_keys = jax.vmap(jax.random.fold_in)(keys, carry.length)
        token = jax.vmap(sampler)(carry.logits, step_keys, carry.seen).astype(jnp.int32)
        # The mask freezes the state of finished sequences; their tokens are dropped by `length`.
        logits, state = model.apply(
            variables, token[:, None], state=carry.state, mask=active[:, None]
        )
        logits = logits[:, 0]
        ends = (token[:, None] == stop[None, :]).any(axis=1)
        carry = _DecodeState(
            state=state,
            logits=logits,
            seen=carry.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool),
            length=carry.length + active,
            done=carry.done | ends,
        )
        return step + 1, carry, tokens.at[:, step].set(token)

    tokens = jnp.zeros((keys.shape[0], capacity), jnp.int32)
    _, carry, tokens = jax.lax.while_loop(unfinished, body, (0, carry, tokens))
    return carry, tokens


def _sequence_keys(key: AnyKey, batch_size: int) -> Key[Array, "B"]:
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


def _prompt_ids(prompts: Prompts, vocab_size: int) -> list[np.ndarray]:
    """The token ids of each prompt, checked."""
    if len(prompts) == 0:
        raise ArgumentError("prompts must have at least one list of token ids, got none; add one.")
    return [_token_ids(ids, f"prompts[{i}]", vocab_size) for i, ids in enumerate(prompts)]


def _token_ids(ids: Any, name: str, vocab_size: int) -> np.ndarray:
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
