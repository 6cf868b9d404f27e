"""Registry of block kinds: each letter of a pattern names one.

A kind is one `BlockKind`; no other code depends on the letters. This module imports neither layers
nor ops, so that configs can look up letters; `modules.block` registers the built-in kinds.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple


class Matrices(NamedTuple):
    """The matrices that a parameter consists of, each from its own inputs to its own outputs."""

    # One letter per axis, without `layers`: input, output, or batch, an axis of separate matrices.
    axes: str = "io"
    parts: int = 1  # matrices of equal size that are concatenated along the output axis, the last


class Work(NamedTuple):
    """What one block computes and moves for one sequence; weights, which are shared, not included.

    Activations have 2 bytes (bfloat16) and the state of a cell has 4, whatever the config says.
    """

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Inference:
    """Cost formulas of one block without gradients, each for one sequence.

    Attributes:
        per_token: LMConfig -> all but sequence mixing, per token: projections, norms, residual
            additions, feed-forward layers.
        prefill: (LMConfig, T) -> sequence mixing of a prompt of T tokens, from the initial state.
        decode: (LMConfig, S, T) -> sequence mixing of T tokens, one call each, after S tokens.
        state_bytes: (LMConfig, S) -> size of the state after S tokens, caches included.
    """

    per_token: Callable[[Any], Work]
    prefill: Callable[[Any, int], Work]
    decode: Callable[[Any, int, int], Work]
    state_bytes: Callable[[Any, int], float]


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """A residual block with its options, logical axes and cost formulas.

    Attributes:
        name: the field of `LMConfig` that has its options; without such a field, their key in
            config.json.
        options: a frozen dataclass with defaults and `check(dim)`, which raises `ConfigError`. It
            may have the attributes `has_dropout` (whether the options set a dropout rate, False by
            default) and `sharded_over_time` (whether time can be sharded, True by default).
        block: an `nn.Module` made from an `LMConfig`, called as block(x, state=None, *, reset=None,
            mask=None, deterministic=True) -> (x, state), with `init_state(batch_size)`. An optional
            field `block_index` is set to the index of the block in the model, only during
            initialization.
        axes: regex for the end of a parameter path -> logical axes, without `layers`. The first
            match wins; these precede the entries in `sharding.axes` that all kinds share.
        count_params: LMConfig -> number of parameters of one block.
        forward_flops: (LMConfig, a key of `counts.CELL_FLOPS`) -> forward FLOPs of one block
            per token, without those of `context_flops`.
        context_flops: (LMConfig, length of the sequence, "causal" or "full") -> forward FLOPs of
            one block per token that depend on the length; "full" counts masked pairs too.
        inference: the cost of prefill and decoding, and the size of the state; without it
            `flops.inference_cost` raises an error.
        matrices: regex for the end of a parameter path -> the matrices of the parameter, or None
            if Muon must not treat it as such. The first match wins; these precede `MATRICES`. Muon
            needs an entry for every parameter.
    """

    name: str
    options: type
    block: Callable[..., Any]
    axes: Mapping[str, tuple[str | None, ...]]
    count_params: Callable[[Any], int]
    forward_flops: Callable[[Any, str], float]
    matrices: Mapping[str, Matrices | None] = dataclasses.field(default_factory=dict)
    context_flops: Callable[[Any, int, str], float] = lambda cfg, seq_len, attention: 0.0
    inference: Inference | None = None


BLOCKS: dict[str, BlockKind] = {}
"""Letter -> kind. Extensions add their own entries."""

IMPLEMENTATIONS: dict[str, Collection[str]] = {}
"""Op -> names of its implementations, filled by `modules.block`, to validate options."""

MATRICES: dict[str, Matrices | None] = {
    r"(token_embedding/embedding|lm_head/kernel)": None,
    r"conv/kernel": None,
    r"(bias|scale|scale_offset)": None,
    r"ffn/proj_down/kernel": Matrices(),
}
"""Entries like those of `BlockKind.matrices` for the parameters that all kinds share."""


def matrices_of(path: str) -> Matrices | None:
    """The matrices of the parameter at a path such as "stack/m/mlstm/proj_up/kernel".

    Raises:
        KeyError: neither its block kind nor `MATRICES` has an entry.
    """
    block = re.search(r"(?:^|/)stack/([^/]+)/", path)
    own = BLOCKS[block[1]].matrices if block and block[1] in BLOCKS else {}
    for pattern, matrices in (*own.items(), *MATRICES.items()):
        if re.search(rf"(^|/){pattern}$", path):
            return matrices
    raise KeyError(path)
