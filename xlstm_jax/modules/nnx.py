"""Models and layers as modules of Flax NNX, and back to trees of parameters.

An NNX module calls the linen one, so that both compute the same. `nnx.bridge.ToNNX` does not
suffice: it initializes op by op, draws a key at every call, and knows no sharding.

`xlstm_jax.modules` does not import this module, nor `flax.nnx`, which takes time.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from flax.errors import InvalidRngError

from xlstm_jax import modules
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules.initializers import jit_once
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.sharding.axes import Axes, free_axes, logical_axes, path_name
from xlstm_jax.sharding.placement import partition_spec
from xlstm_jax.sharding.rules import rules_in_use
from xlstm_jax.typing import PRNGKeyArray, PyTree

# Layer -> where a model has its parameters: tables of logical axes are by paths in a model.
_FOLDERS: dict[type, str] = {
    modules.LM: "",
    modules.Backbone: "",
    modules.MLSTMLayer: "stack/m/mlstm/",
    modules.SLSTMLayer: "stack/s/slstm/",
    modules.LargeMLSTMLayer: "stack/M/mlstm/",
    modules.GatedFeedForward: "ffn/",
    modules.LargeFeedForward: "ffn/",
    modules.CausalConv: "conv/",
    modules.Embedding: "token_embedding/",
    modules.LayerNorm: "norm/",
    modules.RMSNorm: "norm/",
    modules.MultiHeadNorm: "norm/",
}


class LinenModule(nnx.Module):
    """An NNX module that runs a linen module.

    Its attributes are `linen`, that module, and one per entry of the tree of parameters.
    """

    def __init__(self, linen: Any, params: PyTree, dropout: Any, dim: int | None):
        self.linen, self.dim = linen, dim
        self.dropout_rngs = nnx.data(dropout)  # a stream, or None
        for name, tree in params.items():
            if hasattr(self, name):
                raise ArgumentError(
                    f"{type(linen).__name__} must not have parameters named {quote(name)}, which "
                    "is an attribute of NNX modules; rename them."
                )
            setattr(self, name, nnx.data(tree))

    def __call__(self, *args: Any, rngs: nnx.Rngs | None = None, **options: Any) -> Any:
        """Calls the linen module with the parameters of this module.

        Args:
            rngs: with `deterministic=False`, the key of dropout is drawn from its stream `dropout`,
                or its default stream; None: from the stream that `to_nnx` has forked.
        """
        stream: Any = self.dropout_rngs if rngs is None else rngs["dropout"]
        # Drawn only where it is used, as it changes the module.
        if stream is None or options.get("deterministic", True):
            keys = {}
        else:
            keys = {"dropout": stream()}
        try:
            return self.linen.apply({"params": _tree(self)}, *args, rngs=keys, **options)
        except InvalidRngError as error:
            raise ArgumentError(
                "rngs must be an nnx.Rngs where deterministic=False applies dropout, got None; "
                "pass nnx.Rngs(dropout=0) to the call, or rngs to to_nnx."
            ) from error

    def init_state(self, *args: Any, **options: Any) -> Any:
        """`linen.init_state`: the initial state, zeros."""
        return self.linen.init_state(*args, **options)


def to_nnx(
    cfg_or_module: Any,
    params: PyTree | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    dim: int | None = None,
) -> LinenModule:
    """Makes an NNX module with the parameters, outputs and gradients of a linen module.

    It is called without variables: `logits, state = module(tokens, state)`. Each `nnx.Param` has
    its logical axes. On an active mesh (`jax.set_mesh`) parameters are created sharded by the rules
    in use, and so are the moments of `nnx.Optimizer`.

    Args:
        cfg_or_module: an `LMConfig`, for `LM(cfg)`, or a linen module.
        params: its parameters, `variables["params"]`; None: initial parameters.
        rngs: the stream `params` initializes parameters. If the config has dropout, a fork of the
            stream `dropout` serves calls with `deterministic=False`. The default stream stands for
            either. None: `nnx.Rngs(0)`, and no dropout.
        dim: the input width of a layer; models and blocks have it in their config.

    Raises:
        ArgumentError: an argument is invalid, or leaves of `params` do not fit the module.
    """
    linen = cfg_or_module
    if isinstance(linen, modules.LMConfig):
        linen = modules.LM(linen)
    init = _initializer(linen, dim)
    if not (rngs is None or isinstance(rngs, nnx.Rngs)):
        raise ArgumentError(f"rngs must be an nnx.Rngs, got {quote(rngs)}; pass nnx.Rngs(0).")
    specs = None
    if free_axes():
        # Arrays are sharded before Flax sees them: it shards only those that are on the mesh.
        with nnx.use_eager_sharding(False):
            abstract = _annotated(linen, jax.eval_shape(init, jax.random.key(0)))
        specs = nnx.as_pure(nnx.get_partition_spec(abstract))
    if params is None:
        key = jax.random.key(0) if rngs is None else rngs.params()
        params = jit_once(init, out_shardings=specs)(key)
    else:
        params = jax.device_put(_checked("params", params, linen, init), specs)
    # Without dropout the module has no random state, which would be in every checkpoint.
    stream = None
    if rngs is not None and _has_dropout(linen) and ("dropout" in rngs or "default" in rngs):
        stream = rngs["dropout"].fork()
    return LinenModule(linen, _annotated(linen, params), stream, dim)


def from_nnx(module: Any) -> PyTree:
    """The parameters of a module that `to_nnx` made: the tree of `module.linen`.

    Raises:
        ArgumentError: it is another module, or its leaves do not fit the config.
    """
    if not isinstance(module, LinenModule):
        raise ArgumentError(
            f"module must be what to_nnx returned, got {quote(type(module))}; nnx.to_pure_dict "
            "gives the arrays of other modules."
        )
    init = _initializer(module.linen, module.dim)
    return _checked("module", _tree(module), module.linen, init)


def _initializer(linen: Any, dim: int | None) -> Callable[[PRNGKeyArray], PyTree]:
    """A compiled function from a key to the parameters of a module; checks it and `dim`."""
    inputs = _inputs(linen, dim)
    return jax.jit(lambda key: linen.init(key, *inputs).get("params", {}))


def _inputs(linen: Any, dim: int | None) -> tuple[Any, ...]:
    if not isinstance(linen, nn.Module):
        raise ArgumentError(
            f"cfg_or_module must be an LMConfig or a linen module, got {quote(linen)}; pass an "
            "LMConfig, or a layer such as MLSTMLayer(MLSTMConfig()) with dim."
        )
    name, cfg = type(linen).__name__, getattr(linen, "cfg", None)
    if isinstance(linen, modules.LM | modules.Embedding):
        if dim is not None:
            raise ArgumentError(f"dim must be None for {name}, got {quote(dim)}; leave it out.")
        return (jnp.zeros((1, 1), jnp.int32),) if isinstance(linen, modules.LM) else ()
    if isinstance(cfg, modules.LMConfig):
        if dim not in (None, cfg.dim):
            raise ArgumentError(
                f"dim must be that of the config of {name}, {cfg.dim}, got {quote(dim)}; leave it "
                "out."
            )
        dim = cfg.dim
    if dim is None or dim < 1:
        raise ArgumentError(
            f"dim must be the input width of {name}, at least 1, got {quote(dim)}; pass "
            "dim=x.shape[-1]."
        )
    heads = (1,) if isinstance(linen, modules.MultiHeadNorm) else ()
    return (jnp.zeros((1, 1, *heads, dim)),)


def _has_dropout(linen: Any) -> bool:
    cfg = getattr(linen, "cfg", None)
    return bool(getattr(linen, "dropout", 0)) or getattr(cfg, "has_dropout", False)


def _tree(module: LinenModule) -> PyTree:
    """The parameters of a module as arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _checked(argument: str, params: PyTree, linen: Any, init: Any) -> PyTree:
    """`params` in the tree that `init` returns; raises ArgumentError if leaves do not fit."""
    expected = jax.eval_shape(init, jax.random.key(0))
    leaves = _by_path(nnx.as_pure(params))
    wanted, got = ({p: jnp.shape(x) for p, x in t.items()} for t in (_by_path(expected), leaves))
    faults = [
        f"{path} is {got.get(path, 'absent')}, not {wanted.get(path, 'absent')}"
        for path in wanted | got
        if wanted.get(path) != got.get(path)
    ]
    if faults:
        raise ArgumentError(
            f"{argument} must have the leaves of {type(linen).__name__} and its config, but "
            f"{len(faults)} do not fit: {', '.join(faults[:3])}{', ...' * (len(faults) > 3)}; use "
            "variables['params'] from `init` of the same module."
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], expected)


def _by_path(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _annotated(linen: Any, params: PyTree) -> PyTree:
    """The tree with an `nnx.Param` for each leaf, an array or a shape."""
    blocks = {kind.block: f"stack/{letter}/" for letter, kind in BLOCKS.items()}
    folders = blocks | _FOLDERS
    folder = next((folders[cls] for cls in type(linen).__mro__ if cls in folders), None)

    def param(path, leaf):
        name = (folder or "") + path_name(path)
        try:
            axes = logical_axes(name, leaf.ndim)
        except KeyError:
            if folder is not None:
                raise
            return nnx.Param(leaf)  # of a module that is not in the tables: replicated
        return _param(name, axes, leaf)

    return jax.tree_util.tree_map_with_path(param, params)


def _param(name: str, axes: Axes, leaf: Any) -> nnx.Param:
    """A parameter with its logical axes, as Flax stores them."""
    # A partition spec has each mesh axis once, so that a second axis of that name is replicated.
    axes = tuple(None if axis in axes[:n] else axis for n, axis in enumerate(axes))
    # Whether Flax shards variables with this metadata, such as moments, when they are made. It
    # cannot do so without a mesh, nor on axes of several types.
    mesh = jax.sharding.get_abstract_mesh()
    can_shard = not mesh.empty and (mesh.are_all_axes_auto or mesh.are_all_axes_explicit)
    return nnx.Param(
        leaf,
        out_sharding=axes,
        sharding_rules=_Rules(name, leaf.shape),
        eager_sharding=can_shard and nnx.using_eager_sharding(),
    )


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Flax's `sharding_rules` of one parameter: pairs of a logical axis and mesh axes.

    Evaluated when Flax reads them, so that the rules in use and the active mesh are those of the
    reader. Inside `nnx.logical_axis_rules` the rules of that context are used instead.
    """

    path: str
    shape: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[str | None, Any]]:
        if get_logical_axis_rules():
            return
        rules, sizes = rules_in_use(), free_axes()
        if jax.sharding.get_abstract_mesh().empty:  # all axes of the rules, with unknown sizes
            sizes = dict.fromkeys(itertools.chain(*rules.values()), 1)
        spec = partition_spec(self.path, self.shape, rules, sizes)
        # Reversed, as the last pair of a name counts.
        axes = logical_axes(self.path, len(self.shape))
        yield from reversed([*zip(axes, spec, strict=True)])
