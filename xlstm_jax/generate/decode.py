"""Batched generation: prefill, then a jitted loop that decodes one token per iteration.

The recurrent state has a fixed size, so each token costs the same at any context length, and the
state after a prompt can be stored and resumed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from xlstm_jax.config import MAX_INT, ConfigError, as_type, check_range
from xlstm_jax.generate import prefill
from xlstm_jax.generate.arguments import (
    AnyKey,
    Prompts,
    check_sampler,
    prompt_ids,
    sequence_keys,
    token_ids,
)
from xlstm_jax.generate.prepare import is_prepared, prepare_params
from xlstm_jax.generate.sampling import greedy, log_probability
from xlstm_jax.modules.lm import LM
from xlstm_jax.modules.stack import check_stack_state, stack_layers, unstack_layers
from xlstm_jax.typing import Array, Bool, Float, Int

# (logits, key, seen) -> token, without a batch axis. It is a static argument of jit: it must be
# hashable, and equal samplers share a compiled program.
SamplerFn = Callable[..., Int[Array, ""]]
State = Any  # of the model


class Generation(NamedTuple):
    """Generated tokens, and the state after the last token of each sequence."""

    tokens: list[list[int]]  # per prompt; a stop token is included
    state: State  # after prompt and generated tokens; pass it with the next prompts
    logprobs: list[list[float]]  # of each token, before the sampler changes the distribution


class _Carry(NamedTuple):
    """Carry of the decoding loop; layers of the state are in lists."""

    state: State  # after all tokens so far
    logits: Float[Array, "B vocab"]  # of the next token
    seen: Bool[Array, "B vocab"]  # tokens in the prompt or generated so far
    length: Int[Array, "B"]  # number of generated tokens
    done: Bool[Array, "B"]  # a stop token was generated, or the prompt is empty


class _Loop(NamedTuple):
    """Static arguments of the decoding loop."""

    model: LM
    sampler: SamplerFn
    capacity: int  # tokens per call; static, as it is a shape


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
    slots: int | None = None,
) -> Generation:
    """Continues prompts of any lengths, in one batch.

    Padding is masked and leaves the state unchanged, each sequence is sampled with its own key, and
    the passes of prefill depend on its own prompt only. With a given number of `slots`, a result
    does not depend on the other prompts, bit for bit; products of another batch size may differ in
    the last bits.

    Args:
        variables: of the model, or what `prepare_params` returned, which saves the preparation and
            a second copy of the weights.
        prompts: token ids, at least one per prompt: lists of any lengths, or an array.
        max_new_tokens: limit per sequence, a stop token included; 0 only prefills.
        sampler: `greedy`, a `Sampler`, or a hashable (logits, key, seen) -> token, without batch.
        key: sequence i uses `fold_in(key, i)`; or B keys, one per prompt. Not used by `greedy`.
        state: to start from, returned by `generate` or `model.apply`; None: the initial state.
        stop: token ids that end a sequence.
        slots: sequences that are decoded together, which fixes all compiled shapes: rounded up to
            a power of two or a multiple of 16. More prompts are decoded in groups. None: as many as
            prompts.

    Raises:
        ArgumentError: an argument is invalid.
    """
    options: dict[str, Any] = dict(sampler=sampler, key=key, state=state, stop=stop, slots=slots)
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
    slots: int | None = None,
    with_state: bool = True,
) -> Iterator[Generation]:
    """As `generate`, but yields `piece` tokens at a time (None: all) with the state after them.

    Arguments are checked and prompts prefilled before the first `next`. Each state is a copy;
    `with_state=False` yields None instead, which is faster where the state is large.
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
    check_sampler(sampler, model.cfg.vocab_size)
    ids = prompt_ids(prompts, model.cfg.vocab_size)
    num_slots = len(ids) if slots is None else as_type(int, slots, "slots")
    check_range("slots", num_slots, "at least 1", "leave it out to use as many as prompts")
    num_slots = _round_up(num_slots)
    # A stop token outside of the vocabulary, such as that of a larger tokenizer, never occurs.
    stop_ids = token_ids(list(stop), "stop", MAX_INT) if len(stop) else np.zeros(0, np.int32)
    # Padded with an id that never occurs, for few different shapes.
    stop_ids = np.pad(
        stop_ids, (0, _power_of_two(len(stop_ids)) - len(stop_ids)), constant_values=-1
    )
    keys = sequence_keys(jax.random.key(0) if key is None else key, len(ids))
    check_stack_state(model.cfg, state, len(ids))
    if not is_prepared(variables):
        variables = prepare_params(model, variables)
    # A static shape: powers of two bound the number of compiled programs.
    loop = _Loop(model, sampler, _power_of_two(num_at_once))
    groups = [
        _Group(loop, variables, ids, keys, state, jnp.asarray(stop_ids), slice(i, i + num_slots))
        for i in range(0, len(ids), num_slots)
    ]
    return _pieces(groups, num_at_once, max_new_tokens, with_state=with_state)


def _pieces(
    groups: Sequence["_Group"], num_at_once: int, max_new_tokens: int, *, with_state: bool
) -> Iterator[Generation]:
    for start in range(0, max(max_new_tokens, 1), num_at_once):
        limit = min(num_at_once, max_new_tokens - start)
        parts = [group.decode(limit) for group in groups]
        tokens, logprobs = (sum(column, []) for column in zip(*parts, strict=True))
        state = _join_batches([group.state() for group in groups]) if with_state else None
        yield Generation(tokens, state, logprobs)
        if all(group.is_done() for group in groups):
            return


class _Group:
    """Sequences that are decoded together, in a fixed number of slots."""

    def __init__(self, loop, variables, ids, keys, state, stop, group: slice):
        self.loop, self.variables, self.stop = loop, variables, stop
        self.count = len(ids[group])
        num_slots = group.stop - group.start
        # Empty slots repeat a sequence without a prompt: it is done from the start.
        index = np.minimum(np.arange(group.start, group.stop), len(ids) - 1)
        prompts = [*ids[group], *[np.zeros(0, np.int32)] * (num_slots - self.count)]
        self.keys = keys[index]
        self.carry = _first_carry(loop.model, variables, prompts, state, jnp.asarray(index))

    def decode(self, limit: int) -> tuple[list[list[int]], list[list[float]]]:
        """Up to `limit` more tokens of each sequence, and their log-probabilities."""
        before = np.asarray(self.carry.length)
        arguments = dict(keys=self.keys, stop=self.stop, limit=limit)
        self.carry, *buffers = _decode(self.loop, self.variables, self.carry, **arguments)
        # A sequence that stopped earlier has fewer valid tokens in the buffers.
        lengths = (np.asarray(self.carry.length) - before)[: self.count]
        tokens, logprobs = (
            [values[:n] for values, n in zip(np.asarray(buffer).tolist(), lengths, strict=False)]
            for buffer in buffers
        )
        return tokens, logprobs

    def state(self) -> State:
        """The state after the last token of each sequence: a copy, as the loop donates its own."""
        return stack_state(self.carry.state, self.count)

    def is_done(self) -> bool:
        """Whether all sequences have stopped."""
        return bool(self.carry.done.all())


def _round_up(slots: int) -> int:
    """A number of slots for which the results of a slot do not depend on its position.

    With others, XLA computes some elements of an array in vectors and the rest one by one, with
    another rounding of functions such as exp.
    """
    return -(-slots // 16) * 16 if slots > 16 else _power_of_two(slots)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _first_carry(
    model: LM,
    variables: Any,
    prompts: Sequence[np.ndarray],
    state: State | None,
    index: Int[Array, "B"],
) -> _Carry:
    """The carry after prefill; sequence i starts from the state at `index[i]`."""
    batch_size, vocab_size = len(prompts), model.cfg.vocab_size
    seen = np.zeros((batch_size, vocab_size), bool)
    for i, prompt in enumerate(prompts):
        seen[i, prompt] = True
    first = model.init_state(batch_size) if state is None else _select(state, index)
    layers = unstack_state(model.cfg.pattern, first)
    logits, layers = prefill.run(model, variables, prompts, layers)
    return _Carry(
        state=layers,
        logits=logits,
        seen=jnp.asarray(seen),
        length=jnp.zeros(batch_size, jnp.int32),
        done=jnp.asarray([len(prompt) == 0 for prompt in prompts]),
    )


@jax.jit
def _select(state: State, index: Int[Array, "B"]) -> State:
    """Sequences of a stacked state; a copy, as prefill donates its state."""
    return jax.tree.map(lambda leaf: leaf[:, index], state)


@functools.partial(jax.jit, static_argnums=0)
def unstack_state(pattern: str, state: State) -> State:
    """The state with layers in lists; a copy."""
    return unstack_layers(pattern, state)


@functools.partial(jax.jit, static_argnums=1)
def stack_state(layers: State, count: int) -> State:
    """The stacked state of the first `count` sequences; a copy."""
    return jax.tree.map(lambda leaf: leaf[:, :count], stack_layers(layers))


def _join_batches(states: list[State]) -> State:
    if len(states) == 1:
        return states[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *states)


@functools.partial(jax.jit, static_argnames="loop", donate_argnames="carry")
def _decode(
    loop: _Loop,
    variables: Any,
    carry: _Carry,
    *,
    keys: Key[Array, "B"],
    stop: Int[Array, "stop"],
    limit: Int[Array, ""] | int,
) -> tuple[_Carry, Int[Array, "B capacity"], Float[Array, "B capacity"]]:
    """Generates up to `limit` tokens per sequence, fewer if all sequences are done.

    `limit` is dynamic; the width of the token buffer is static.
    """

    def unfinished(values):
        step, carry, *_ = values
        return (step < limit) & ~carry.done.all()

    def body(values):
        step, carry, tokens, logprobs = values
        active = ~carry.done
        # Folding in the length makes samples independent of when other sequences stop.
        step_keys = jax.vmap(jax.random.fold_in)(keys, carry.length)
        token = jax.vmap(loop.sampler)(carry.logits, step_keys, carry.seen).astype(jnp.int32)
        logprob = log_probability(carry.logits, token)
        # The mask freezes the state of finished sequences; their tokens are dropped by `length`.
        logits, state = loop.model.apply(
            variables, token[:, None], state=carry.state, mask=active[:, None]
        )
        logits = prefill.replicate_explicit(logits[:, 0])
        carry = _Carry(
            state=state,
            logits=logits,
            seen=carry.seen.at[jnp.arange(token.size), token].set(True),
            length=carry.length + active,
            done=carry.done | (token[:, None] == stop[None, :]).any(axis=1),
        )
        tokens = tokens.at[:, step].set(token)
        return step + 1, carry, tokens, logprobs.at[:, step].set(logprob)

    shape = keys.shape[0], loop.capacity
    buffers = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, carry.logits.dtype)
    _, carry, *buffers = jax.lax.while_loop(unfinished, body, (0, carry, *buffers))
    return carry, *buffers
