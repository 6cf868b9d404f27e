"""The blocks of a model, in the order of its pattern.

Parameters and states are grouped by letter: those of all "m" blocks are in `m`, stacked along a
leading axis `layers`. The kind of loop over the blocks is chosen per call and affects neither. With
scans, compile time does not grow with depth; it grows with the irregularity of the pattern, and
with rematerialization mostly not even with that. For decoding, both may be lists of the layers of a
letter (`unstack_layers`), and the loop is then unrolled.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules import loops
from xlstm_jax.modules.capture import check_names, collect, gates_of_block, states_at_positions
from xlstm_jax.modules.checks import check_param_names, check_state
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.patterns import Run, find_period, split_runs
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, PyTree, Size

# Letter -> stacked state of its blocks, with leaves "layers B ...", or the list of their states.
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
"""`LMConfig.remat` -> residuals that a scan step saves besides its input; "offload" saves those of
"names" in host memory."""

MAX_UNROLLED_BLOCKS = 6
"""Depth up to which a model is unrolled: a scan stores and slices the arrays passed between blocks,
which takes a tenth to a quarter of a small model's step on a CPU."""


# A context variable and not a global: threads may initialize and run models at the same time.
_skip_blocks = contextvars.ContextVar("skip_blocks", default=False)


@contextlib.contextmanager
def only_parameters() -> Iterator[None]:
    """Within the context, initialization creates parameters and does not run the blocks."""
    token = _skip_blocks.set(True)
    try:
        yield
    finally:
        _skip_blocks.reset(token)


class Stack(nn.Module):
    """All blocks of a model."""

    cfg: LMConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: StackState | None = None,
        reset: Flag | None = None,
        mask: Flag | None = None,
        *,
        deterministic: bool = True,
        capture: Sequence[str] = (),
    ) -> tuple[Any, ...]:
        """Returns x and the new state, and what is captured if anything is: see `LM`."""
        check_names(capture)
        check_param_names(self, set(self.cfg.pattern))
        check_stack_state(self.cfg, state, x.shape[0])
        cfg, flags = self.cfg, dict(reset=reset, mask=mask)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(letter: str, x, params_and_state, index):
            params, state = params_and_state
            # Functional `apply` of a detached block: its parameters are slices of the stacked tree.
            block = BLOCKS[letter].block(cfg, parent=None)
            run = functools.partial(block.apply, {"params": params})
            # By index, so that a block draws the same mask whichever loop runs it.
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
            options = dict(deterministic=deterministic, rngs=rngs)
            mutable = ["gates"] if "gates" in capture else []
            (y, new), variables = run(x, state, **flags, **options, mutable=mutable)
            y = checkpoint_name(constrain(y, "batch", "time", None), "block_output")
            captured = {}
            if gates := gates_of_block(variables):
                captured["gates"] = gates
            if "state" in capture:
                first = block.init_state(x.shape[0]) if state is None else state
                captured["state"] = states_at_positions(run, x, first, new, **flags)
            if "hidden" in capture:
                captured["hidden"] = y
            return y, (new, captured)

        blocks = {
            letter: (self._params(letter, x), None if state is None else state[letter])
            for letter in sorted(set(cfg.pattern))
        }
        if self.is_initializing() and _skip_blocks.get():
            return x, state
        # Unrolled blocks are never rematerialized: without a scan and with prevent_cse=False, XLA
        # would merge the recomputation with the forward pass (common subexpressions).
        is_list = [isinstance(tree, list) for trees in blocks.values() for tree in trees]
        if any(is_list) or (cfg.remat == "none" and cfg.num_blocks <= MAX_UNROLLED_BLOCKS):
            x, layers = loops.unrolled(cfg.pattern, apply, x, blocks)
            if not capture and isinstance(next(iter((state or {}).values()), None), list):
                return x, {letter: [new for new, _ in pairs] for letter, pairs in layers.items()}
            results = stack_layers(layers)
        else:
            policy = REMAT_POLICIES.get(cfg.remat)
            checkpoint = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
            wrap = (lambda step: step) if cfg.remat == "none" else checkpoint
            x, results = loops.scanned(choose_runs(cfg, x.shape[1]), apply, x, blocks, wrap)
        states = {letter: new for letter, (new, _) in results.items()}
        if not capture:
            return x, states
        captured = {letter: trees for letter, (_, trees) in results.items()}
        return x, states, collect(capture, cfg.pattern, captured)

    def _params(self, letter: str, x: Float[Array, "B T D"]) -> PyTree:
        """Parameters of all blocks of a letter; every leaf is "layers ..."."""
        cfg = self.cfg
        if not self.is_initializing():
            params, count = self.get_variable("params", letter), cfg.pattern.count(letter)
            is_list = isinstance(params, list)
            leaves = jax.tree.leaves(params)
            counts = {(len(params),)} if is_list else {leaf.shape[:1] for leaf in leaves}
            if counts != {(count,)}:
                raise ArgumentError(
                    f"params of blocks {letter!r} must have {count} layers for "
                    f"pattern={quote(cfg.pattern)}, got {sorted(n for (n,) in counts) or 'none'}; "
                    "use parameters from `init` of the same model."
                )
            return params
        indices = jnp.asarray([n for n, other in enumerate(cfg.pattern) if other == letter])

        def init_block(key, index):
            cls = BLOCKS[letter].block
            has_index = "block_index" in getattr(cls, "__dataclass_fields__", {})
            block = cls(cfg, parent=None, **({"block_index": index} if has_index else {}))
            # One position of one sequence: parameters do not depend on batch size or length.
            return block.init(key, x[:1, :1])["params"]

        def init_blocks(key):
            keys = jax.random.split(key, len(indices))
            return jax.jit(jax.vmap(init_block))(keys, indices)

        return self.param(letter, init_blocks)


def choose_runs(cfg: LMConfig, T: Size) -> tuple[Run, ...]:
    """Chooses the scans for a pattern and a sequence length T.

    A single run whose steps omit blocks compiles the fewest blocks, at the price of a branch. The
    branch saves residuals whether taken or not, so it is only used with rematerialization. Every
    step of the backward pass also accumulates into the gradients of all blocks of an omitted
    letter, so the most frequent letter may not be omitted.
    """
    runs, period = split_runs(cfg.pattern), find_period(cfg.pattern)
    is_shorter = len(period.unit) < sum(len(run.unit) for run in runs)
    omits_only_rare = period.always_has(max(period.unit, key=cfg.pattern.count))
    is_better = cfg.remat != "none" and T != 1 and is_shorter and omits_only_rare
    return (period,) if is_better else runs


def check_stack_state(cfg: LMConfig, state: StackState | None, batch_size: Size) -> None:
    """Raises ValueError unless the state is None or belongs to this model and batch size."""
    owner = f"pattern={quote(cfg.pattern)} and {batch_size} sequences"
    remedy = f"init_state({batch_size}) of the same model"
    has_lists = isinstance(state, dict) and any(isinstance(s, list) for s in state.values())

    def init():
        first = init_state(cfg, batch_size)
        return unstack_layers(cfg.pattern, first) if has_lists else first

    check_state(state, init, owner, remedy)


def unstack_layers(pattern: str, trees: Mapping[str, PyTree]) -> dict[str, list[PyTree]]:
    """Letter -> trees of its layers, of parameters or states that are stacked."""
    return {letter: loops.as_list(tree, pattern.count(letter)) for letter, tree in trees.items()}


def stack_layers(layers: Mapping[str, list[PyTree]]) -> dict[str, PyTree]:
    """The inverse of `unstack_layers`."""
    return {letter: loops.stack(trees) for letter, trees in layers.items()}


def init_state(cfg: LMConfig, batch_size: Size, dtype: DTypeLike | None = None) -> StackState:
    """The initial state of all blocks: zeros, stacked by letter; `dtype` is that of activations."""
    name = cfg.dtype if dtype is None else getattr(dtype, "__name__", str(dtype))
    if name not in (names := ("float32", "bfloat16", "float64")):
        raise ArgumentError(f"dtype must be one of {names}, got {quote(dtype)}; or pass None.")
    # Float64 is no `cfg.dtype`: it comes from the parameters and applies to every leaf.
    is_wide = name == "float64"
    cfg = cfg if is_wide else dataclasses.replace(cfg, dtype=name)

    def stacked(letter: str) -> Any:
        one = BLOCKS[letter].block(cfg, parent=None).init_state(batch_size)
        n = cfg.pattern.count(letter)

        def stack(leaf: Array) -> Array:
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            leaf = leaf.astype(jnp.float64) if is_wide and is_float else leaf
            return jnp.broadcast_to(leaf[None], (n, *leaf.shape))

        return jax.tree.map(stack, one)

    return {letter: stacked(letter) for letter in sorted(set(cfg.pattern))}
