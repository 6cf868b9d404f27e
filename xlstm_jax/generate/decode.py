"""Prompts to answers: a chunkwise prefill, then one jitted loop that makes a token per iteration.

The state of a recurrent model has one size whatever the length of the text, so every token costs
the same, and the state after a prompt can be stored and continued.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from xlstm_jax.config import ConfigError
from xlstm_jax.generate.sampling import greedy
from xlstm_jax.modules.lm import LM, lm_logits
from xlstm_jax.typing import Array, Bool, Float, Int, PRNGKeyArray

# Positions in one pass over a prompt: the most, to bound its memory, and the least, so that short
# prompts share one compiled pass. Between them widths are powers of two.
PREFILL, LEAST_PREFILL = 512, 16

# (logits, key, seen) -> token, for one row; hashable, and equal where it does the same.
SamplerFn = Callable[..., Int[Array, ""]]
State = Any  # the model's own
AnyKey = PRNGKeyArray | Key[Array, "keys"]


class Generation(NamedTuple):
    """Answers, and the state after the last token of each."""

    tokens: list[list[int]]  # per prompt, a stop token included as the last one
    state: State  # has read prompts and answers: pass it on with what comes next


class _Cursor(NamedTuple):
    """Where decoding stands; the state has read everything before the token to be drawn."""

    state: State
    logits: Float[Array, "B vocab"]  # of the token to be drawn
    seen: Bool[Array, "B vocab"]  # occurred in the prompt or the answer
    length: Int[Array, "B"]  # tokens of the answer so far
    done: Bool[Array, "B"]


def generate(
    model: LM,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: SamplerFn = greedy,
    key: AnyKey | None = None,
    state: State | None = None,
    stop: Sequence[int] = (),
) -> Generation:
    """Answers to prompts of any lengths, in one batch.

    An answer does not depend on the other prompts: short prompts are padded with positions that
    leave the state untouched, and each answer is drawn from a key of its own.

    Args:
        prompts: token ids, at least one per prompt.
        sampler: `greedy`, a `Sampler`, or any hashable (logits, key, seen) -> token, without batch.
        key: answer i draws from `fold_in(key, i)`; or B keys, one each. Not used by `greedy`.
        state: to start from, as `Generation.state` or `model.apply` gave it; None: the initial one.
        stop: token ids that end an answer.

    Raises:
        ConfigError: names the argument that no answer can be made from.
    """
    options: dict[str, Any] = dict(sampler=sampler, key=key, state=state, stop=stop)
    return next(stream(model, variables, prompts, max_new_tokens=max_new_tokens, **options))


def stream(
    model: LM,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    piece: int | None = None,
    sampler: SamplerFn = greedy,
    key: AnyKey | None = None,
    state: State | None = None,
    stop: Sequence[int] = (),
) -> Iterator[Generation]:
    """As `generate`, `piece` tokens at a time (None: all), each piece with the state after it."""
    piece = max_new_tokens if piece is None else piece
    if max_new_tokens < 0 or piece < min(1, max_new_tokens):
        raise ConfigError(
            "max_new_tokens must be at least 0 and piece at least 1, "
            f"got {max_new_tokens} and {piece}."
        )
    if key is None and sampler is not greedy:
        raise ConfigError(
            "key must be given for a sampler that draws at random, got None; "
            "pass jax.random.key(seed), or sampler=greedy."
        )
    keys = _row_keys(jax.random.key(0) if key is None else key, len(prompts))
    cursor = prefill(model, variables, prompts, state)
    decode = functools.partial(
        _decode,
        model,
        variables,
        keys=keys,
        stop=jnp.asarray(list(stop), jnp.int32),
        sampler=sampler,
        # A power of two, so that few sizes of the token buffer are ever compiled.
        capacity=_power_of_two(piece),
    )

    def pieces(cursor: _Cursor) -> Iterator[Generation]:
        made = 0
        while True:
            before = cursor.length
            cursor, tokens = decode(cursor, limit=min(piece, max_new_tokens - made))
            rows = zip(np.asarray(tokens).tolist(), np.asarray(cursor.length - before), strict=True)
            yield Generation([row[:length] for row, length in rows], cursor.state)
            made += piece
            if made >= max_new_tokens or bool(cursor.done.all()):
                return

    return pieces(cursor)


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def prefill(
    model: LM, variables: Any, prompts: Sequence[Sequence[int]], state: State | None
) -> _Cursor:
    """Reads the prompts in chunkwise passes.

    They are padded on the right, so that a prompt meets the same chunk boundaries in any company.
    """
    batch_size, vocab_size = len(prompts), model.cfg.vocab_size
    _check_prompts(prompts, vocab_size)
    shapes = jax.eval_shape(lambda: model.init_state(batch_size))
    if state is None:
        state = model.init_state(batch_size)
    elif jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, shapes):
        raise ConfigError(
            f"state must be a state of this model for {batch_size} prompts, got one of other "
            "shapes; give as many prompts as the state has sequences."
        )
    lengths = np.array([len(prompt) for prompt in prompts])
    start, total = 0, int(lengths.max())
    tokens = np.zeros((batch_size, total + PREFILL), np.int32)
    seen = np.zeros((batch_size, vocab_size), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        seen[row, tokens[row, : len(prompt)]] = True
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    logits = jnp.zeros((batch_size, vocab_size), jnp.float32)
    while start < total:
        width = min(PREFILL, max(LEAST_PREFILL, _power_of_two(total - start)))
        now = np.s_[:, start : start + width]
        logits, state = _read(model, variables, tokens[now], mask[now], state, logits)
        start += width
    return _Cursor(
        state=state,
        logits=logits,
        seen=jnp.asarray(seen),
        length=jnp.zeros(batch_size, jnp.int32),
        done=jnp.zeros(batch_size, bool),
    )


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: LM,
    variables: Any,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    state: State,
    logits: Float[Array, "B vocab"],
) -> tuple[Float[Array, "B vocab"], State]:
    """The logits after the last token of each row, which a row without tokens keeps, and the state.

    The head sees one position per row: the logits of a whole prompt would outweigh the model.
    """
    hidden, state = model.apply(variables, tokens, state=state, mask=mask, head=False)
    last = jnp.maximum(mask.sum(axis=1) - 1, 0)
    x = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    now = lm_logits(model.cfg, variables["params"], x)
    return jnp.where(mask.any(axis=1)[:, None], now, logits), state


@functools.partial(jax.jit, static_argnames=("model", "sampler", "capacity"))
def _decode(
    model: LM,
    variables: Any,
    cursor: _Cursor,
    *,
    keys: Key[Array, "B"],
    stop: Int[Array, "stop"],
    limit: Int[Array, ""] | int,
    sampler: SamplerFn,
    capacity: int,
) -> tuple[_Cursor, Int[Array, "B capacity"]]:
    """Up to `limit` more tokens for each row, fewer when all rows have met a stop token."""

    def unfinished(carry):
        turn, cursor, _ = carry
        return (turn < limit) & ~cursor.done.all()

    def body(carry):
        turn, cursor, tokens = carry
        active = ~cursor.done
        # Folding in the length makes a row's draws independent of when its neighbors stop.
        draws = jax.vmap(jax.random.fold_in)(keys, cursor.length)
        token = jax.vmap(sampler)(cursor.logits, draws, cursor.seen).astype(jnp.int32)
        logits, state = model.apply(
            variables, token[:, None], state=cursor.state, mask=active[:, None]
        )
        logits = logits[:, 0]
        ends = (token[:, None] == stop[None, :]).any(axis=1)
        cursor = _Cursor(
            state=state,
            logits=logits,
            seen=cursor.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool),
            length=cursor.length + active,
            done=cursor.done | ends,
        )
        return turn + 1, cursor, tokens.at[:, turn].set(token)

    tokens = jnp.zeros((keys.shape[0], capacity), jnp.int32)
    _, cursor, tokens = jax.lax.while_loop(unfinished, body, (0, cursor, tokens))
    return cursor, tokens


def _row_keys(key: AnyKey, batch_size: int) -> Key[Array, "B"]:
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ConfigError(
            f"key must be one key or one for each of {batch_size} prompts, got {key.shape}; "
            "give a single key to have it split."
        )
    return key


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise ConfigError("prompts must hold at least one list of token ids, got none.")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(
                f"prompts[{row}] must hold at least one token, got none; "
                "give it the text to continue."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"prompts[{row}] must hold token ids in 0..{vocab_size - 1}, got {min(prompt)} to "
                f"{max(prompt)}; encode it with the tokenizer the model was trained with."
            )
