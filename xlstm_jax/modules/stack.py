"""Blocks in the order of a pattern, each run of the pattern compiled once and scanned.

Compile time grows with the letters of the cut pattern, not with depth. Parameters and states of a
run have a leading axis `layers`, one entry per repeat, also where a run is not repeated.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlstm_jax.modules.block import BLOCKS
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.patterns import cut
from xlstm_jax.typing import Array, Bool, Float, Int

# Per run, per block of its unit: the block's state, every leaf "layers B ...".
StackState = tuple[tuple[Any, ...], ...]

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("block_output", "chunk_states"),
}
"""What a rematerialised group keeps for the backward pass, besides its input."""


UNROLLED_BLOCKS = 6
"""A model of at most so many blocks is compiled block by block: a scan stores and slices what its
blocks exchange, a tenth to a quarter of a small model's step on a CPU."""


class Group(nn.Module):
    """The blocks of one unit, one after the other."""

    cfg: LMConfig
    unit: str
    deterministic: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        first_block: Int[Array, ""],
        states: tuple[Any, ...] | None,
        reset: Bool[Array, "B T"] | None,
        mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        if reset is not None or mask is not None:
            # Tied to x, or JAX would compute all that follows from resets and masks alone, one
            # L x L table after the other, before the scan over groups, and keep it.
            flags = (reset, mask, jax.lax.stop_gradient(x))
            reset, mask, _ = jax.lax.optimization_barrier(flags)
        new_states = []
        for j, letter in enumerate(self.unit):
            block = BLOCKS[letter](self.cfg, self.deterministic, name=f"block_{j}")
            state = None if states is None else states[j]
            x, state = block(x, state, reset, mask, first_block + j)
            x = checkpoint_name(x, "block_output")
            new_states.append(state)
        return x, tuple(new_states)


class Stack(nn.Module):
    """All blocks of a model: run i of the cut pattern holds its parameters under `run_i`."""

    cfg: LMConfig
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: StackState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], StackState]:
        cfg, group = self.cfg, Group
        unroll = cfg.num_blocks <= UNROLLED_BLOCKS
        if cfg.remat != "none":
            # In a scan nothing made again can be merged with the forward pass, written out it is.
            unroll = False
            group = nn.remat(Group, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        new_state, start = [], 0
        for i, run in enumerate(cut(cfg.pattern)):
            scanned = nn.scan(
                group,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=run.repeats,
                unroll=run.repeats if unroll else 1,
            )
            stop = start + run.num_blocks
            first_blocks = jnp.arange(start, stop, len(run.unit), dtype=jnp.int32)
            run_state = None if state is None else state[i]
            layers = scanned(cfg, run.unit, self.deterministic, name=f"run_{i}")
            x, run_state = layers(x, first_blocks, run_state, reset, mask)
            new_state.append(run_state)
            start = stop
        return x, tuple(new_state)


def init_state(cfg: LMConfig, batch_size: int) -> StackState:
    """The empty memory of all blocks."""
    return tuple(
        tuple(
            jax.tree.map(
                lambda leaf, n=run.repeats: jnp.broadcast_to(leaf[None], (n, *leaf.shape)),
                BLOCKS[letter](cfg, parent=None).init_state(batch_size),
            )
            for letter in run.unit
        )
        for run in cut(cfg.pattern)
    )
