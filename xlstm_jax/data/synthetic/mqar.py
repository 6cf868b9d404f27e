"""Multi-query associative recall: pairs of a key and a value, then every key once as a query.

Sources: Arora et al. 2023, arXiv:2312.04927; settings of Beck et al. 2024, arXiv:2405.04517,
appendix B.1.2. A sequence of T tokens, an even number, starts with K pairs, `k1 v1 k2 v2 ...`. In
the other T - 2K positions each key occurs once, at an even offset, and its target is its value.
Token 0 is blank; keys are ids below vocab_size / 2, values those from vocab_size / 2 on,
each without repetition. Slots are drawn without replacement with the weights slot^(alpha - 1),
slots counted from 1, so that with a small alpha most queries come early.

In the sample, a value is the answer after its query, so its target is at the query. All
sequences have T = data.seq_len tokens if data.min_len and data.max_len are both T + 1.
"""

import numpy as np
from jaxtyping import Bool, Int, Int64, UInt64

from xlstm_jax.data import hashing
from xlstm_jax.data.synthetic.draws import draw
from xlstm_jax.data.synthetic.tasks import PAD, Option, Options, Sequences, SyntheticTask

_KEYS, _VALUES, _SLOTS, _BLANKS = range(4)  # streams of random numbers of a sample


def generate(
    keys: UInt64[np.ndarray, "N"], lengths: Int64[np.ndarray, "N"], padded_len: int, opts: Options
) -> Sequences:
    """Sequences of T = lengths - 1 tokens, rounded down to an even number."""
    K, vocab_size = opts["num_pairs"], opts["vocab_size"]
    half, num_tokens = vocab_size // 2, (lengths - 1) // 2 * 2
    recall_keys = 1 + _distinct(keys, _KEYS, K, half - 1)
    values = half + _distinct(keys, _VALUES, K, vocab_size - half)
    slots = draw_slots(keys, num_tokens // 2 - K, K, opts["alpha"])
    tokens, is_answer = layout(recall_keys, values, slots, padded_len)
    if opts["random_blanks"]:
        ids = draw(keys, padded_len, vocab_size, _BLANKS)
        inside = np.arange(padded_len) < num_tokens[:, None]
        tokens = np.where((tokens == PAD) & inside, ids, tokens)
    return Sequences(tokens, is_answer, num_tokens + 1)


def layout(
    recall_keys: Int[np.ndarray, "N K"],
    values: Int[np.ndarray, "N K"],
    slots: Int[np.ndarray, "N K"],
    padded_len: int,
) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """Tokens with blanks of 0, and where they are answers; query i is in slot `slots[:, i]`."""
    N, K = recall_keys.shape
    tokens = np.full((N, padded_len), PAD, np.int64)
    is_answer = np.zeros((N, padded_len), bool)
    tokens[:, : 2 * K : 2], tokens[:, 1 : 2 * K : 2] = recall_keys, values
    queries = 2 * (K + slots)
    np.put_along_axis(tokens, queries, recall_keys, axis=1)
    np.put_along_axis(tokens, queries + 1, values, axis=1)
    np.put_along_axis(is_answer, queries + 1, True, axis=1)
    return tokens, is_answer


def draw_slots(
    keys: UInt64[np.ndarray, "N"], num_slots: Int64[np.ndarray, "N"], num_pairs: int, alpha: float
) -> Int[np.ndarray, "N K"]:
    """K slots from 0 without replacement, each draw weighted by (slot + 1)^(alpha - 1)."""
    slot = np.arange(num_slots.max(initial=num_pairs))
    draws = hashing.fold(_stream(keys, _SLOTS)[:, None], slot.astype(np.uint64)[None])
    # The slot whose exponential clock, of rate `weight`, rings first is drawn first, and so on.
    times = -np.log(hashing.uniform(draws)) / (slot + 1.0) ** (alpha - 1)
    times[slot >= num_slots[:, None]] = np.inf
    return np.argsort(times, axis=1, kind="stable")[:, :num_pairs]


def _distinct(
    keys: UInt64[np.ndarray, "N"], stream: int, count: int, size: int
) -> Int[np.ndarray, "N K"]:
    """`count` different integers below `size` per key, in random order."""
    index = np.tile(np.arange(count), len(keys))
    repeated = np.repeat(_stream(keys, stream), count)
    return hashing.permute(index, size, repeated).reshape(-1, count)


def _stream(keys: UInt64[np.ndarray, "N"], stream: int) -> UInt64[np.ndarray, "N"]:
    return hashing.fold(keys, np.full(1, stream, np.uint64))


TASK = SyntheticTask(
    name="mqar",
    category="memory",
    options={
        "vocab_size": Option(8192, lambda opts: 2 * opts["num_pairs"] + 2),
        "num_pairs": Option(4, 1),
        "alpha": Option(0.01, 0.0),
        "random_blanks": Option(False),  # blanks hold any id; after a query they are always 0
    },
    generate=generate,
    chance=lambda opts: 1 / (opts["vocab_size"] - opts["vocab_size"] // 2),
    min_len=lambda opts: 4 * opts["num_pairs"] + 1,
)
