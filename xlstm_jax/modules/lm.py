"""Language model: embedding, blocks, final norm, head."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from jax.typing import DTypeLike

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.time import as_bool
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.checks import check_param_names, difference
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.initializers import jit_once, normal, small
from xlstm_jax.modules.linear import Dense, Embedding
from xlstm_jax.modules.norm import LayerNorm, RMSNorm
from xlstm_jax.modules.stack import Stack, StackState, init_state, only_parameters
from xlstm_jax.ops.dense import dense
from xlstm_jax.ops.documents import document_starts
from xlstm_jax.ops.embed import embed
from xlstm_jax.ops.int8 import Int8Kernel
from xlstm_jax.ops.norm import soft_cap
from xlstm_jax.sharding import constrain
from xlstm_jax.typing import Array, Flag, Float, Int, Size


class _Model(nn.Module):
    cfg: LMConfig

    @nn.nowrap
    def init_state(self, batch_size: Size, dtype: DTypeLike | None = None) -> StackState:
        """The initial state, zeros: a dict by letter whose leaves are `layers B ...`.

        `dtype` is that of activations: None is `cfg.dtype`; float64 belongs to float64 parameters.
        Calls of the model then return states of the same dtypes, as a scan over calls requires.
        """
        return init_state(self.cfg, batch_size, dtype)

    @nn.nowrap
    def init(self, rngs: Any, x: Array, *args: Any, **options: Any) -> Any:
        """As `nn.Module.init`, but creates the parameters only, in one compiled program.

        `init_with_output` computes the outputs too.
        """
        if args or options:
            with only_parameters():
                return super().init(rngs, x, *args, **options)
        # One position of one sequence: parameters do not depend on batch size or length.
        like = x if x.ndim < 2 else jnp.zeros((1, 1, *x.shape[2:]), x.dtype)
        return _init(self, rngs, like)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """As `nn.Module.apply`, but names the first parameter that does not fit the config."""
        try:
            return super().apply(variables, *args, **options)
        except FlaxError:
            if "params" not in variables:
                raise ArgumentError(
                    "variables must be a dict with the key 'params', as `init` returns, got the "
                    f"keys {quote(sorted(variables))}; write {{'params': params}}."
                ) from None
            check_params(*self._own_params(variables["params"], param_shapes(self.cfg)))
            raise

    @nn.nowrap
    def _own_params(self, *trees: Any) -> tuple[Any, ...]:
        return trees

    def _blocks_and_norm(self, x, state, reset, mask, **options: Any) -> tuple[Any, ...]:
        """Returns x, then what follows it in the result of the stack."""
        cfg, stack = self.cfg, Stack(self.cfg, name="stack")
        x, *rest = stack(x, state, reset, mask, **options)
        if cfg.final_norm == "none":
            return x, *rest
        norm = final_norm(cfg, name="out_norm")
        return norm(x), *rest


@functools.partial(jit_once, static_argnums=0)
def _init(module: nn.Module, rngs: Any, x: Array) -> Any:
    with only_parameters():
        return nn.Module.init(module, rngs, x)


class LM(_Model):
    """Next-token logits at every position, and the state to continue from.

    Sources: arXiv:2405.04517 (first-generation blocks), arXiv:2503.13427 (large blocks).
    """

    @on_any_mesh
    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: StackState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Flag | None = None,
        *,
        head: bool = True,
        has_padding: bool = True,
        deterministic: bool = True,
        capture: Sequence[str] = (),
    ) -> tuple[Any, ...]:
        """Runs the model over tokens, starting from `state`.

        Args:
            tokens: ids below `vocab_size`. Others are embedded as NaN, and so are their logits:
                under jit their values cannot be checked.
            state: state before the first position; None: the initial state.
            segment_ids: document of each token, from 1; 0 is padding. The state is reset where the
                id changes, and at the first token if no state is passed. None: one document.
            mask: False where a position is skipped; it then leaves the state unchanged.
            has_padding: False promises that no segment id is 0, and saves the cost of masking.
            head: False returns the hidden states after the final norm instead of logits.
            deterministic: False applies dropout and requires `rngs={"dropout": key}`.
            capture: names of activations to return as well, of every block and position.

        Returns logits `B T vocab` in float32 or wider (hidden states `B T D` in the activation
        dtype), and the state after the last position. If anything is captured, then also a dict
        with these entries:
            gates: letter -> what its layers compute from their gates, `layers B T ...`, by the
                names of `ops.trace`. Kinds whose layers store none (`capture.sow_gates`) are left
                out.
            state: the state after every position, as the state but with leaves `layers B T ...`.
                The matrix memory of an mLSTM makes it T times as large. Blocks run again, one
                position at a time.
            hidden: output of every block in the order of the pattern, `layers B T D`.

        Raises:
            ValueError: an array has the wrong shape; a name to capture is unknown.
        """
        cfg = self.cfg
        _check(tokens, segment_ids, mask)
        has_head = not cfg.tie_embeddings or self._has_int8_head()
        head_names = ["lm_head"] if has_head else []
        norm_names = [] if cfg.final_norm == "none" else ["out_norm"]
        norm_names += [] if cfg.embedding_norm == "none" else ["embedding_norm"]
        check_param_names(self, ["token_embedding", "stack", *norm_names, *head_names])
        reset = None
        if segment_ids is not None:
            reset = document_starts(segment_ids)
            if has_padding:
                is_token = segment_ids != 0
                mask = is_token if mask is None else as_bool(mask) & is_token
        x, table = embed_tokens(cfg, tokens, deterministic=deterministic)
        options = dict(deterministic=deterministic, capture=capture)
        x, *rest = self._blocks_and_norm(x, state, reset, mask, **options)
        if not head:
            return x, *rest
        # Rebuilt from the bound variables, so that `lm_logits` is the only code of the head.
        params: dict[str, Any] = {"token_embedding": {"embedding": table}}
        if has_head:
            init = small(cfg.dim) if cfg.head_std is None else normal(cfg.head_std)
            layer = Dense(cfg.vocab_size, init, name="lm_head")
            params["lm_head"] = {"kernel": layer.weights(cfg.dim)[0]}
        return lm_logits(cfg, params, x), *rest

    def _has_int8_head(self) -> bool:
        """Whether a tied head has a kernel of its own, as that of the embedding is not rounded."""
        head = self.variables.get("params", {}).get("lm_head", {})
        return isinstance(head.get("kernel"), Int8Kernel)


class Backbone(_Model):
    """Blocks and final norm of a model, for inputs that are vectors instead of tokens.

    Its parameters are those of `LM` without `token_embedding` and `lm_head`; `vocab_size` and the
    options of embedding and head have no effect.
    """

    @on_any_mesh
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
        """As `LM`, from vectors to hidden states; the state is reset where `reset` is True."""
        if x.ndim != 3 or x.shape[-1] != self.cfg.dim:
            raise ArgumentError(
                f"x must have the axes (B T D) with D={self.cfg.dim}, got {x.shape}; "
                "a single sequence is x[None]."
            )
        options = dict(deterministic=deterministic, capture=capture)
        return self._blocks_and_norm(x, state, reset, mask, **options)

    @nn.nowrap
    def _own_params(self, *trees: Any) -> tuple[Any, ...]:
        names = ("stack", "out_norm")  # those of an `LM` are accepted too
        return tuple({name: tree[name] for name in names if name in tree} for tree in trees)


def embed_tokens(cfg: LMConfig, tokens: Array, *, deterministic: bool) -> tuple[Array, Array]:
    """The input of the first block and the table of embeddings, within a compact method."""
    init = small(cfg.dim) if cfg.embedding_std is None else normal(cfg.embedding_std)
    table = Embedding(cfg.vocab_size, cfg.dim, init, name="token_embedding")()
    # Float64 parameters override `cfg.dtype`: the model computes in float64 throughout.
    dtype = table.dtype if table.dtype == jnp.float64 else jnp.dtype(cfg.dtype)
    x = embed(tokens, table, dtype=dtype)
    if cfg.embedding_norm == "layer_scale":
        x = LayerNorm(cfg.final_norm_eps, True, as_offset=False, name="embedding_norm")(x)
    rate = cfg.dropout if cfg.embedding_dropout else 0.0
    return nn.Dropout(rate, deterministic=deterministic)(x), table


def final_norm(cfg: LMConfig, **options: Any) -> LayerNorm | RMSNorm:
    """The norm of the last hidden states, unless `cfg.final_norm` is "none"."""
    norm = LayerNorm if cfg.final_norm.startswith("layer") else RMSNorm
    as_offset = cfg.final_norm in ("layer", "rms_offset")
    return norm(cfg.final_norm_eps, cfg.final_norm_bias, as_offset, **options)


def check_params(params: Any, expected: Any) -> None:
    """Raises ArgumentError, naming the first difference, unless the trees have the same leaves."""
    if mismatch := difference(params, expected):
        raise ArgumentError(
            f"params must be those of this config: {mismatch}; "
            "use parameters from `init` of the same config."
        ) from None


def param_shapes(cfg: LMConfig) -> Any:
    """Shapes and dtypes of a model's parameters, without computing them; any depth costs the same.

    Parameters of equal blocks are stacked, so those of one block per letter tell all shapes.
    """
    letters = "".join(dict.fromkeys(cfg.pattern))
    model = LM(dataclasses.replace(cfg, pattern=letters))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    for letter, tree in params["stack"].items():
        count = cfg.pattern.count(letter)
        params["stack"][letter] = jax.tree.map(
            lambda leaf, n=count: leaf.update(shape=(n, *leaf.shape[1:])), tree
        )
    return params


def head_kernel(cfg: LMConfig, params: Any) -> Float[Array, "D vocab"] | Int8Kernel:
    """The kernel of the head, tied or not; `params` is `variables["params"]`."""
    if cfg.tie_embeddings and "lm_head" not in params:
        return params["token_embedding"]["embedding"].T
    return params["lm_head"]["kernel"]


def lm_logits(
    cfg: LMConfig, params: Any, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch vocab"]:
    """Logits from hidden states after the final norm, soft-capped, in float32 or wider."""
    dtype = state_dtype(hidden)
    logits = dense(hidden, head_kernel(cfg, params), dtype=dtype)
    if logits.ndim == 3:  # else each device would compute all of them with a replicated kernel
        logits = constrain(logits, "batch", "time", "vocab")
    return soft_cap(logits, cfg.logit_soft_cap)


def _check(tokens, segment_ids, mask) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ArgumentError(
            f"tokens must have the axes (B T) with at least one position, got {tokens.shape}; "
            "a single sequence is tokens[None]."
        )
    for name, array in (("segment_ids", segment_ids), ("mask", mask)):
        if array is not None and array.shape != tokens.shape:
            raise ArgumentError(
                f"{name} must have the shape of tokens, {tokens.shape}, got {array.shape}; "
                "pass one value per token, or None."
            )
