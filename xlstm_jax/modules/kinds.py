"""Block kinds: what a letter of a pattern stands for.

A kind is one record; nothing else in the library knows letters. This module imports neither layers
nor ops, so that a config can look letters up; `modules.block` registers the built-in kinds.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """A residual block with its options, sharding and cost.

    Attributes:
        name: the field of `LMConfig` with its options, or else their key in config.json.
        options: a frozen dataclass with defaults and `check(dim)`, which raises `ConfigError`. It
            may have `has_dropout` (of its own, False by default) and `sharded_over_time` (whether
            devices can share a sequence, True by default).
        block: an `nn.Module` made from an `LMConfig`, called as block(x, state=None, *, reset=None,
            mask=None, deterministic=True) -> (x, state), with `init_state(batch_size)`. An optional
            field `block_index` gets the number of the block in the model while parameters are
            initialized.
        axes: the end of a parameter's path (regex) -> its logical axes, without `layers`; the first
            match counts, before the rows in `sharding.axes` that all kinds share.
        count_params: LMConfig -> parameters of one block.
        forward_flops: (LMConfig, a key of `counts.CELL_FLOPS`) -> FLOPs of one block and token.
    """

    name: str
    options: type
    block: Callable[..., Any]
    axes: Mapping[str, tuple[str | None, ...]]
    count_params: Callable[[Any], int]
    forward_flops: Callable[[Any, str], float]


BLOCKS: dict[str, BlockKind] = {}
"""Letter -> kind: the whole registry."""

IMPLEMENTATIONS: dict[str, Collection[str]] = {}
"""Op -> names of its implementations, set by `modules.block`: options are checked without `ops`."""
