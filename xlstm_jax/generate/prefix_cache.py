"""Cache of the states after common prefixes of prompts, such as a system prompt.

Prefill runs in passes of fixed widths. The state after a full pass depends, bit for bit, only on
the tokens before it and on the widths of the passes, because prompts are padded on the right and
the width of a pass is a function of the number of tokens that are left. So the states at these
boundaries can replace the passes before them in every prompt with the same beginning.
"""

import collections
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Integer

from xlstm_jax.config import as_type
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.generate import decode, prefill
from xlstm_jax.generate.arguments import token_ids
from xlstm_jax.generate.prepare import is_prepared, prepare_params
from xlstm_jax.modules.lm import LM


class Prefix(NamedTuple):
    """A prompt after the prefill of all passes but the last."""

    state: Any  # after the tokens before `rest`; None: the initial state
    rest: Integer[np.ndarray, "T"]  # tokens that are left, at least one


class PrefixCache:
    """States of one model, at most `max_bytes` of them; the least recently used are dropped first.

    Raises:
        ConfigError: `max_bytes` is negative or no integer.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes: int = as_type(int, max_bytes, "max_bytes")
        if self.max_bytes < 0:
            raise ArgumentError(
                f"max_bytes must be at least 0, got {quote(max_bytes)}; 0 stores nothing."
            )
        self.num_bytes = 0  # of all states
        self._states: collections.OrderedDict[bytes, Any] = collections.OrderedDict()
        self._owner: tuple[LM, list[Any]] | None = None

    def __len__(self) -> int:
        """Number of states."""
        return len(self._states)

    def prefill(
        self, model: LM, variables: Any, prompt: Sequence[int] | Integer[np.ndarray, "T"]
    ) -> Prefix:
        """The state after the full passes of a prompt: from the cache, or computed and stored.

        `generate(model, variables, [prefix.rest], state=prefix.state, ...)` gives the tokens and
        the state of `generate(model, variables, [prompt], ...)`, bit for bit. A sampler that asks
        which tokens were seen, as for a repetition penalty, is told those of `rest` only.

        Args:
            variables: of the model, or what `prepare_params` returned, which saves time.

        Raises:
            ArgumentError: the prompt is invalid, or the cache has states of another model or of
                other parameters.
        """
        ids = token_ids(prompt, "prompt", model.cfg.vocab_size)
        return self.read(variables, model, variables, ids)

    def read(self, owner: Any, model: LM, variables: Any, ids: Integer[np.ndarray, "T"]) -> Prefix:
        """As `prefill`, for `variables` that were prepared from those of the `owner`."""
        self._check_owner(model, owner)
        ends = list(itertools.accumulate(prefill.passes(len(ids))[:-1]))
        keys = list(_keys(ids, ends))
        known = max((n for n, key in enumerate(keys, 1) if key in self._states), default=0)
        state, start = None, 0
        if known:
            state, start = self._states[keys[known - 1]], ends[known - 1]
            self._states.move_to_end(keys[known - 1])
        if known < len(keys) and not is_prepared(variables):
            variables = prepare_params(model, variables)
        for key, end in zip(keys[known:], ends[known:], strict=True):
            state = state_after(model, variables, ids[start:end], state)
            self._store(key, state)
            start = end
        return Prefix(state, ids[start:])

    def _check_owner(self, model: LM, variables: Any) -> None:
        leaves = jax.tree.leaves(variables)
        if self._owner is None:
            self._owner = model, leaves
        owner, others = self._owner
        # By identity: comparing values would cost more than it saves.
        if model != owner or [*map(id, leaves)] != [*map(id, others)]:
            raise ArgumentError(
                "cache must have states of this model and of these arrays of parameters only, but "
                "was used with others; make a PrefixCache for each model."
            )

    def _store(self, key: bytes, state: Any) -> None:
        self._states[key] = state
        self.num_bytes += state_bytes(state)
        while self.num_bytes > self.max_bytes:
            _, oldest = self._states.popitem(last=False)
            self.num_bytes -= state_bytes(oldest)


def state_bytes(state: Any) -> int:
    """Bytes of all leaves of a state; None has none."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def state_after(model: LM, variables: Any, ids: Integer[np.ndarray, "T"], state: Any) -> Any:
    """The state after more tokens, from the initial one if it is None; for prepared variables."""
    layers = decode.unstack_state(
        model.cfg.pattern, model.init_state(1) if state is None else state
    )
    _, layers = prefill.run(model, variables, [ids], layers)
    return decode.stack_state(layers, 1)


def _keys(ids: Integer[np.ndarray, "T"], ends: Sequence[int]) -> Iterator[bytes]:
    """A hash per boundary, of the tokens before it and of all boundaries up to it."""
    key, start = b"", 0
    for end in ends:
        tokens = ids[start:end].astype("<i4").tobytes()  # its length tells the width of the pass
        key = hashlib.sha256(key + tokens).digest()
        start = end
        yield key
