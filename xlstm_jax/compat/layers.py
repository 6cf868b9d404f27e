"""Stacks of LSTM, sLSTM and mLSTM cells, in one or both directions, called like `torch.nn.LSTM`.

A layer is a linear projection and an op. Sources: both directions, Schuster & Paliwal 1997,
"Bidirectional recurrent neural networks"; alternating ones, Alkin et al. 2024, arXiv:2406.04303.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, lstm_init, mlstm_init, slstm_init
from xlstm_jax.compat.padding import backward_reset, length_mask
from xlstm_jax.errors import ArgumentError, UnsupportedError, quote
from xlstm_jax.modules.any_mesh import on_any_mesh
from xlstm_jax.modules.checks import check_param_names, check_state
from xlstm_jax.modules.initializers import linspace, small, uniform, zeros
from xlstm_jax.modules.linear import Dense, fused_dense
from xlstm_jax.modules.slstm import cell_bias_init
from xlstm_jax.ops.activations import sigmoid_gate
from xlstm_jax.ops.checks import check_choice
from xlstm_jax.ops.flags import Flags
from xlstm_jax.typing import Array, ArrayLike, Flag, Float, Int, Size

MERGES = ("concat", "sum", "alternate")


class State(NamedTuple):
    """The state of a stack: that of each cell, in the order of PyTorch.

    Cells are sorted by layer, and in a layer the forward direction comes first.
    """

    cells: tuple[Any, ...]  # LSTMState, SLSTMState or MLSTMState

    @property
    def h_n(self) -> Float[Array, "cells B F"]:
        """The hidden states of all cells, heads concatenated, as PyTorch returns them."""
        return self._stack("h")

    @property
    def c_n(self) -> Float[Array, "cells B F"]:
        """The cell states of all cells, like `h_n`; of an sLSTM times exp(-m)."""
        return self._stack("c")

    def _stack(self, name: str) -> Float[Array, "cells B F"]:
        if not all(hasattr(cell, name) for cell in self.cells):
            kind = type(self.cells[0]).__name__
            raise UnsupportedError(
                f"{name}_n must be of an LSTM or sLSTM, got {kind}, whose leaves are "
                f"{', '.join(self.cells[0]._fields)}; use state.cells, or the last output."
            )
        leaves = [getattr(cell, name) for cell in self.cells]
        return jnp.stack([leaf.reshape(leaf.shape[0], -1) for leaf in leaves])


export.register_namedtuple_serialization(State, serialized_name="xlstm_jax.compat.State")


class _Cell(nn.Module):
    """One cell over a sequence, in one direction."""

    features: int
    num_heads: int
    bias: bool
    implementation: str

    def heads(self, x: Float[Array, "B T F"], *axes: int) -> Float[Array, "B T ..."]:
        """The last axis as `axes`, heads and the features of a head."""
        H = self.num_heads
        return x.reshape(*x.shape[:2], *axes, H, self.features // H)


class _LSTMCell(_Cell):
    @nn.compact
    def __call__(self, x, state, **options: Any):
        H, F = self.num_heads, self.features
        init = uniform(1 / math.sqrt(F))  # as in PyTorch
        gates = Dense(4 * F, init, upcast=True, name="proj")(x)
        r = self.param("recurrent_kernel", init, (H, F // H, 4, F // H))
        b = self.param("bias", init, (H, 4, F // H)) if self.bias else None
        return ops.lstm(
            self.heads(gates, 4), r, b, state, implementation=self.implementation, **options
        )


class _SLSTMCell(_Cell):
    @nn.compact
    def __call__(self, x, state, **options: Any):
        H, F = self.num_heads, self.features
        gates = Dense(4 * F, small(x.shape[-1]), upcast=True, name="proj")(x)
        r = self.param("recurrent_kernel", zeros, (H, F // H, 4, F // H))
        bias_init = cell_bias_init("small_init", 0, 1)
        b = self.param("bias", bias_init, (H, 4, F // H)) if self.bias else None
        return ops.slstm(
            self.heads(gates, 4), r, b, state, implementation=self.implementation, **options
        )


class _MLSTMCell(_Cell):
    """h = sigmoid(o) mLSTM(q, k, v, i, f), with q, k, v, o, i, f projected from x.

    Source: Beck et al. 2024, arXiv:2405.04517, section 2.3.
    """

    @nn.compact
    def __call__(self, x, state, **options: Any):
        H, F, bias = self.num_heads, self.features, self.bias
        init = small(x.shape[-1])
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = fused_dense(x, *(Dense(F, init, bias, name=name) for name in names))
        # Gates start at their biases for every input, and the output gate at 1/2.
        i, f, o = fused_dense(
            x,
            Dense(H, zeros, bias, upcast=True, name="input_gate"),
            Dense(H, zeros, bias, linspace(3.0, 6.0), upcast=True, name="forget_gate"),
            Dense(F, zeros, bias, upcast=True, name="output_gate"),
        )
        q, k, v = (self.heads(y) for y in (q, k, v))
        h, state = ops.mlstm(q, k, v, i, f, state, implementation=self.implementation, **options)
        return sigmoid_gate(self.heads(o), h), state


class _Recurrent(nn.Module):
    """Fields and call of `LSTM`, `SLSTM` and `MLSTM`."""

    CELL: ClassVar[type[_Cell]]

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = True  # False: x and y are `T B F`, as by default in PyTorch
    dropout: float = 0.0  # of the output of each layer but the last
    bidirectional: bool = False  # the same as Bidirectional(layer, "concat")
    num_heads: int = 1  # H; recurrent weights, or the matrix memory, are within a head
    reverse: bool = False  # from the last valid position to the first; y has the positions of x
    implementation: str = "auto"  # of the op

    def __post_init__(self):
        for name in ("input_size", "hidden_size", "num_layers", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ArgumentError(f"{name} must be an integer of at least 1, got {quote(value)}.")
        if self.hidden_size % self.num_heads:
            raise ArgumentError(
                f"num_heads must divide hidden_size={self.hidden_size}, got {self.num_heads}; use "
                "1, or change hidden_size."
            )
        if not 0 <= self.dropout <= 1:
            raise ArgumentError(
                f"dropout must be a probability, from 0 to 1, got {quote(self.dropout)}; use 0.0 "
                "for none."
            )
        if self.bidirectional and self.reverse:
            raise ArgumentError(
                "reverse must be False with bidirectional=True, got True; both directions are read "
                "already."
            )
        super().__post_init__()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: State | None = None,
        *,
        lengths: Int[ArrayLike, "batch"] | Sequence[int] | None = None,
        mask: Flag | None = None,
        reset: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T F"], State]:
        """The outputs of the last layer, and the state of every cell after its last step.

        Args:
            x: inputs; `T B D` with `batch_first=False`, and then `mask` and `reset` are `T B`.
            state: before the first step; None is the initial state, zeros.
            lengths: numbers of valid positions, from 0 to T; the others, at the end, are padding.
            mask: where False, the position is padding, wherever it is. Padding changes no state
                and no other output; its own output is 0, and its x may be anything, also NaN.
            reset: True at the first position of each packed sequence: neither direction carries its
                state across. At a masked position it is ignored.
            deterministic: False applies dropout, with the key `dropout`.

        Raises:
            ArgumentError: an argument does not fit; names it, its value and what fits.
        """
        merge = "concat" if self.bidirectional else None
        return self.merged(x, state, lengths, mask, reset, merge, deterministic=deterministic)

    @nn.nowrap
    def init_state(self, batch_size: Size, dtype: DTypeLike = jnp.float32) -> State:
        """The initial state: zeros, float32 or wider."""
        return self.init_merged(batch_size, dtype, "concat" if self.bidirectional else None)

    @nn.nowrap
    def init_merged(self, batch_size: Size, dtype: DTypeLike, merge: str | None) -> State:
        """`init_state` of the directions that `merge` reads."""
        H, dtype = self.num_heads, jnp.promote_types(dtype, jnp.float32)
        count = sum(len(self._directions(index, merge)) for index in range(self.num_layers))
        cells = [self._init_cell(batch_size, H, self.hidden_size // H, dtype) for _ in range(count)]
        return State(tuple(cells))

    def merged(
        self,
        x: Float[Array, "B T D"],
        state: State | None,
        lengths: Int[ArrayLike, "batch"] | Sequence[int] | None,
        mask: Flag | None,
        reset: Flag | None,
        merge: str | None,
        *,
        deterministic: bool,
    ) -> tuple[Float[Array, "B T F"], State]:
        """The call for directions merged as in `Bidirectional`; None: a single direction."""
        self._check_input(x, lengths, mask, reset)
        if not self.batch_first:
            x, mask, reset = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, mask, reset))
        B, T, _ = x.shape
        if lengths is not None:
            mask = length_mask(lengths, B, T)
        remedy = f"init_state({B}) of the layer, or of Bidirectional"
        owner = f"{type(self).__name__} and {B} sequences"
        check_state(state, lambda: self.init_merged(B, jnp.float32, merge), owner, remedy)
        flags = Flags.of(reset, mask)
        y, state = self._run(x, state, flags, merge, deterministic=deterministic)
        return y if self.batch_first else jnp.swapaxes(y, 0, 1), state

    @on_any_mesh
    @nn.compact
    def _run(
        self, x: Array, state: State | None, flags: Flags, merge: str | None, *, deterministic: bool
    ) -> tuple[Array, State]:
        # Names as in PyTorch; a layer with one direction, whichever it is, has no suffix.
        directions = [self._directions(index, merge) for index in range(self.num_layers)]
        names = [
            [f"l{index}" + "_reverse" * number for number in range(len(reverses))]
            for index, reverses in enumerate(directions)
        ]
        check_param_names(self, sum(names, []))
        x, cells = flags.zero_masked(x), []
        for index, reverses in enumerate(directions):
            outputs = []
            for name, reverse in zip(names[index], reverses, strict=True):
                cell = type(self).CELL(
                    self.hidden_size, self.num_heads, self.bias, self.implementation, name=name
                )
                before = None if state is None else state.cells[len(cells)]
                reset = backward_reset(flags) if reverse else flags.reset
                h, after = cell(x, before, reset=reset, mask=flags.mask, reverse=reverse)
                outputs.append(h.reshape(*h.shape[:2], -1).astype(x.dtype))
                cells.append(after)
            is_sum = merge == "sum"
            x = outputs[0] + outputs[1] if is_sum else jnp.concatenate(outputs, axis=-1)
            if index < self.num_layers - 1:
                x = nn.Dropout(self.dropout, deterministic=deterministic)(x)
        return x, State(tuple(cells))

    @nn.nowrap
    def _directions(self, index: int, merge: str | None) -> tuple[bool, ...]:
        """Whether each cell of a layer runs in reverse."""
        if merge == "alternate":
            return (index % 2 == 1,)
        return (self.reverse,) if merge is None else (False, True)

    @nn.nowrap
    def _check_input(self, x: Array, lengths: Any, mask: Any, reset: Any) -> None:
        layout = "B T" if self.batch_first else "T B"
        if x.ndim != 3 or x.shape[-1] != self.input_size:
            raise ArgumentError(
                f"x must have the axes ({layout} {self.input_size}), the last one being "
                f"input_size, got shape {x.shape}; add a missing axis, or change input_size."
            )
        if lengths is not None and mask is not None:
            raise ArgumentError(
                "lengths must be None with a mask, got both; a mask alone marks any padding."
            )
        for name, flag in (("mask", mask), ("reset", reset)):
            if flag is not None and flag.shape != x.shape[:2]:
                raise ArgumentError(
                    f"{name} must have the axes ({layout}) of x, {x.shape[:2]}, got shape "
                    f"{flag.shape}; pass one value per position."
                )


class LSTM(_Recurrent):
    """Layers of LSTM cells, with the arguments and results of `torch.nn.LSTM`.

    Weights are initialized uniformly in +-1 / sqrt(hidden_size), as in PyTorch, but with one bias.
    """

    CELL = _LSTMCell
    _init_cell = staticmethod(lstm_init)


class SLSTM(_Recurrent):
    """Layers of sLSTM cells: exponential input gates; forget gates start open.

    Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
    """

    CELL = _SLSTMCell
    _init_cell = staticmethod(slstm_init)


class MLSTM(_Recurrent):
    """Layers of mLSTM cells with output gates, parallel over time.

    The state of a head is a matrix of (hidden_size / num_heads)**2 numbers.
    Source: Beck et al. 2024, arXiv:2405.04517, section 2.3.
    """

    CELL = _MLSTMCell

    @staticmethod
    def _init_cell(batch_size: Size, num_heads: int, head_dim: int, dtype: DTypeLike) -> MLSTMState:
        return mlstm_init(batch_size, num_heads, head_dim, head_dim, dtype)


class Bidirectional(nn.Module):
    """A layer that reads every sequence in both directions.

    | merge | each of `num_layers` layers | width |
    |---|---|---|
    | "concat" | runs in both directions; outputs are concatenated | 2 hidden_size |
    | "sum" | runs in both directions; outputs are added | hidden_size |
    | "alternate" | runs forward (the first, third, ...) or backward | hidden_size |

    A backward cell starts at the last valid position. Its final state is that after the first one.
    """

    layer: _Recurrent
    merge: str = "concat"

    def __post_init__(self):
        check_choice("Bidirectional", "merge", self.merge, MERGES)
        if isinstance(self.layer, _Recurrent) and (self.layer.bidirectional or self.layer.reverse):
            name = "bidirectional" if self.layer.bidirectional else "reverse"
            raise ArgumentError(
                f"layer must read in one direction, got {name}=True; leave that to Bidirectional."
            )
        super().__post_init__()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: State | None = None,
        *,
        lengths: Int[ArrayLike, "batch"] | Sequence[int] | None = None,
        mask: Flag | None = None,
        reset: Flag | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B T F"], State]:
        """Arguments and results are those of the layer."""
        flags = lengths, mask, reset
        return self.layer.merged(x, state, *flags, self.merge, deterministic=deterministic)

    @property
    def dropout(self) -> float:
        """That of the layer."""
        return self.layer.dropout

    @nn.nowrap
    def init_state(self, batch_size: Size, dtype: DTypeLike = jnp.float32) -> State:
        """The initial state: zeros, float32 or wider."""
        return self.layer.init_merged(batch_size, dtype, self.merge)
