"""Statistics of gates and matrix memories, per block and head.

Source: what the stabilized recurrence of Beck et al. 2024, arXiv:2405.04517, computes from its
gates, as `ops.trace` returns it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.cells import LSTMState, MLSTMState, SLSTMState
from xlstm_jax.cells.mlstm import floor_acts
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.typing import Array, Bool, Float, PyTree

_CELLS = (LSTMState, SLSTMState, MLSTMState)


def gate_statistics(
    cfg: LMConfig,
    gates: Mapping[str, Mapping[str, Array]],
    state: PyTree,
    is_token: Bool[Array, "B T"],
) -> dict[str, dict[str, Float[Array, "layers H"]]]:
    """Statistics of every head over all positions that are tokens, by letter and name.

    Args:
        gates: what a model captures as "gates". A letter without `i` and `f` is left out.
        state: after the last position.

    Returns:
        forget_mean: mean forget gate.
        effective_length: 1 / (1 - forget_mean), in tokens: after so many, 1/e of a value is left.
        input_mean, input_min, input_max: of the pre-activation of the input gate.
        floor_share: share of positions where the normalizer is at its floor; mLSTM only.
        m_min, m_max: of the stabilizer.
        C_norm: norm of the stored memory, C exp(-m) or c exp(-m), after the last position; mean
            over sequences.
    """
    return {
        letter: _of_letter(cfg.options_of(letter), traces, state[letter], is_token)
        for letter, traces in gates.items()
        if all(name in traces and traces[name].ndim > 3 for name in "if")
    }


def _of_letter(
    options: Any, traces: Mapping[str, Array], state: PyTree, is_token: Bool[Array, "B T"]
) -> dict[str, Array]:
    def mean(x: Array) -> Array:
        mask, axes = _mask(is_token, x)
        return jnp.mean(x, axes, where=mask)

    def extremes(name: str, x: Array) -> dict[str, Array]:
        mask, axes = _mask(is_token, x)
        low = jnp.min(x, axes, initial=jnp.inf, where=mask)
        return {f"{name}_min": low, f"{name}_max": jnp.max(x, axes, initial=-jnp.inf, where=mask)}

    f, i = (traces[name].astype(jnp.float32) for name in "fi")
    is_exp = getattr(options, "forget_gate", "sigmoid") == "exp"
    # 1 - f directly: a difference to 1 would lose the digits of long memories.
    forgotten = mean(-jnp.expm1(f) if is_exp else jax.nn.sigmoid(-f))
    statistics = {"forget_mean": 1 - forgotten, "effective_length": 1 / forgotten}
    statistics |= {"input_mean": mean(i)} | extremes("input", i)
    m = traces.get("m")
    is_mlstm = getattr(options, "normalize", False) and "normalizer" in traces
    if m is not None and is_mlstm:
        acts = floor_acts(traces["normalizer"], m, eps=options.eps)
        statistics["floor_share"] = mean(acts.astype(jnp.float32))
    if m is not None:
        statistics |= extremes("m", m)
    cells = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _CELLS))
    for cell in (cell for cell in cells if isinstance(cell, _CELLS)):
        memory = cell[0]  # layers B H ...
        norms = jnp.sqrt(jnp.sum(memory**2, axis=tuple(range(3, memory.ndim))))
        statistics["C_norm"] = jnp.mean(norms, axis=1)
    return statistics


def _mask(is_token: Bool[Array, "B T"], x: Array) -> tuple[Array, tuple[int, ...]]:
    """The mask of a `layers B T H ...` array, and its axes except layers and H."""
    mask = jnp.expand_dims(is_token, (0, *range(3, x.ndim)))
    return mask, (1, 2, *range(4, x.ndim))
