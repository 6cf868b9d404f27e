"""Stack manipulation: the stack after a list of actions. A deterministic context-free language.

A sample is a stack, bottom first, then actions, ACT and the resulting stack, bottom first. ACT is
1, POP is 2; the S = (vocab_size - 3) // 2 ids from 3 on are symbols on the stack, and those after
them push the symbols. POP on an empty stack does nothing.

The number of tokens n of a sample, answer included, is drawn. The first stack has 1 to (n - 1) / 2
symbols, uniformly, and as many uniform actions follow as fit. As a push needs two tokens, a sample
may be one token shorter. Samples whose last stack is empty are drawn again.

Sources: Beck et al. 2024, arXiv:2405.04517, appendix B.1.1; Delétang et al. 2023, arXiv:2207.02098.
"""

import numpy as np
from jaxtyping import Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.draws import draw, draw_one, take
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask

ACT, POP, FIRST_SYMBOL = 1, 2, 3
_SYMBOLS, _ACTIONS, _SIZE = 0, 1, 2  # streams of random numbers


def generate(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Random stacks and actions, and what they leave on the stack."""
    tokens = np.empty((len(keys), padded_len), np.int64)
    is_answer = np.zeros_like(tokens, bool)
    num_symbols = (opts["vocab_size"] - FIRST_SYMBOL) // 2
    pending = np.arange(len(keys))
    while len(pending):
        tokens[pending], is_answer[pending] = _draw_once(
            keys[pending], lengths[pending], padded_len, num_symbols
        )
        pending = pending[~is_answer[pending].any(axis=1)]
        keys = hashing.mix(keys)
    end = padded_len - np.argmax(is_answer[:, ::-1], axis=1)
    return Sequences(tokens, is_answer, end)


def _draw_once(keys, lengths, padded_len: int, num_symbols: int):
    """Tokens and flags of the answers; without an answer where the last stack is empty."""
    first_size = 1 + draw_one(keys, (lengths - 1) // 2, _SIZE)
    symbols = FIRST_SYMBOL + draw(keys, padded_len, num_symbols, _SYMBOLS)
    actions = POP + draw(keys, padded_len, num_symbols + 1, _ACTIONS)
    last, size, num_actions = _run(symbols, first_size, actions, lengths, num_symbols)
    position, first_size = np.arange(padded_len), first_size[:, None]
    act = first_size + num_actions[:, None]  # the position of ACT
    is_answer = (position > act) & (position <= act + size[:, None])
    # An action id is POP, or that of a symbol, which is FIRST_SYMBOL - POP ids after `actions`.
    pushes = np.where(actions == POP, POP, actions + num_symbols)
    tokens = np.select(
        [position < first_size, position < act, position == act, is_answer],
        [symbols, take(pushes, position - first_size), ACT, take(last, position - act - 1)],
        PAD,
    )
    return tokens, is_answer


def _run(symbols, first_size, actions, lengths, num_symbols: int):
    """The last stack, its size, and the number of actions after which the sample is full."""
    stack, size, samples = symbols.copy(), first_size.copy(), np.arange(len(symbols))
    num_actions = np.zeros_like(size)
    is_open = np.ones_like(size, bool)
    for action in actions.T:
        is_push = action != POP
        new_size = np.maximum(size + np.where(is_push, 1, -1), 0)
        # Of all actions that fit, the last one is followed by a push that does not.
        is_open &= first_size + num_actions + 1 + 1 + new_size <= lengths
        if not is_open.any():
            break
        pushed = samples[is_push & is_open]
        stack[pushed, size[pushed]] = action[pushed]
        size = np.where(is_open, new_size, size)
        num_actions += is_open
    return stack, size, num_actions


TASK = SyntheticTask(
    name="stack_manipulation",
    category="deterministic context-free",
    options={"vocab_size": Option(11, FIRST_SYMBOL + 2)},
    generate=generate,
    chance=lambda opts: 1 / ((opts["vocab_size"] - FIRST_SYMBOL) // 2),
    min_len=lambda opts: 3,
)
