"""The blocks of a model, in the order of its pattern.

Parameters and states are grouped by letter: those of all "m" blocks are `m`, stacked along a first
axis `layers`. How the blocks are looped over is chosen per call and changes neither. In loops,
compile time grows with the irregularity of a pattern, with rematerialization mostly not even with
that, and never with depth.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlstm_jax.modules import loops
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.patterns import Run, find_period, split_runs
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Bool, Float, PyTree

# Letter -> state of its blocks, every leaf "layers B ...".
StackState = dict[str, Any]

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("block_output"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_output"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a rematerialized step saves for the backward pass besides its input; "offload" saves what
"names" does, in host memory."""

UNROLLED_BLOCKS = 6
"""A model of at most so many blocks is compiled block by block: a scan stores and slices what its
blocks exchange, a tenth to a quarter of a small model's step on a CPU."""


class Stack(nn.Module):
    """All blocks of a model."""

    cfg: LMConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: StackState | None = None,
        reset: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T D"], StackState]:
        cfg, flags = self.cfg, dict(reset=reset, mask=mask, deterministic=deterministic)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(letter: str, x, own, number):
            params, state = own
            block = BLOCKS[letter].block(cfg, parent=None)
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, number)}
            x, state = block.apply({"params": params}, x, state, **flags, rngs=rngs)
            x = constrain(x, "batch", "time", None)
            return checkpoint_name(x, "block_output"), state

        blocks = {
            letter: (self._params(letter, x), None if state is None else state[letter])
            for letter in sorted(set(cfg.pattern))
        }
        # Without a scan, XLA would merge what is rematerialized with the forward pass.
        if cfg.remat == "none" and cfg.num_blocks <= UNROLLED_BLOCKS:
            return loops.one_by_one(cfg.pattern, apply, x, blocks)
        policy = REMAT_POLICIES.get(cfg.remat)
        checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        wrap = (lambda step: step) if cfg.remat == "none" else checkpoint
        return loops.scanned(runs_of(cfg, x.shape[1]), apply, x, blocks, wrap)

    def _params(self, letter: str, x: Float[Array, "B T D"]) -> PyTree:
        """Parameters of all blocks of a letter, every leaf "layers ..."."""
        cfg = self.cfg
        if not self.is_initializing():
            params, count = self.get_variable("params", letter), cfg.pattern.count(letter)
            counts = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
            if counts != {(count,)}:
                raise ValueError(
                    f"params of blocks {letter!r} must hold {count} layers for "
                    f"pattern={cfg.pattern!r}, got {sorted(n for (n,) in counts) or 'none'}; "
                    "use parameters made by init of the same model."
                )
            return params
        numbers = jnp.asarray([n for n, other in enumerate(cfg.pattern) if other == letter])

        def init_block(key, number):
            cls = BLOCKS[letter].block
            has_index = "block_index" in getattr(cls, "__dataclass_fields__", {})
            block = cls(cfg, parent=None, **({"block_index": number} if has_index else {}))
            return block.init(key, x[:1, :1])["params"]

        def init_blocks(key):
            keys = jax.random.split(key, len(numbers))
            return jax.jit(jax.vmap(init_block))(keys, numbers)

        return self.param(letter, init_blocks)


def runs_of(cfg: LMConfig, T: int) -> tuple[Run, ...]:
    """What to loop over.

    Steps that leave blocks out need the fewest compiled blocks, at the price of a branch. A branch
    has residuals whether it was taken or not, so it is for training with rematerialization; and
    every step of the backward pass adds to the gradients of all blocks of the letter that is left
    out, so that may only be a rare one.
    """
    runs, period = split_runs(cfg.pattern), find_period(cfg.pattern)
    is_shorter = len(period.unit) < sum(len(run.unit) for run in runs)
    leaves_out_rarely = period.has_always(max(period.unit, key=cfg.pattern.count))
    is_better = cfg.remat != "none" and T > 1 and is_shorter and leaves_out_rarely
    return (period,) if is_better else runs


def init_state(cfg: LMConfig, batch_size: int) -> StackState:
    """The initial state of all blocks: zeros."""

    def of_all(letter: str) -> Any:
        one = BLOCKS[letter].block(cfg, parent=None).init_state(batch_size)
        n = cfg.pattern.count(letter)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (n, *leaf.shape)), one)

    return {letter: of_all(letter) for letter in sorted(set(cfg.pattern))}
