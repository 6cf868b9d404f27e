"""Every implementation of every op, with the reason if it cannot run on this machine."""

import jax.numpy as jnp

from xlstm_jax.errors import ArgumentError
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.attention.api import IMPLEMENTATIONS as ATTENTION
from xlstm_jax.ops.gated_delta import IMPLEMENTATIONS as GATED_DELTA
from xlstm_jax.ops.lstm import IMPLEMENTATIONS as LSTM
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS as MLSTM
from xlstm_jax.ops.selective_scan import IMPLEMENTATIONS as SELECTIVE_SCAN
from xlstm_jax.ops.slstm.api import IMPLEMENTATIONS as SLSTM
from xlstm_jax.ops.ssd import IMPLEMENTATIONS as SSD
from xlstm_jax.ops.wkv import IMPLEMENTATIONS as WKV

TABLES = {
    "attention": ATTENTION,
    "gated_delta_rule": GATED_DELTA,
    "lstm": LSTM,
    "mlstm": MLSTM,
    "selective_scan": SELECTIVE_SCAN,
    "slstm": SLSTM,
    "ssd": SSD,
    "wkv": WKV,
}


def implementations(op: str) -> dict[str, str | None]:
    """For each implementation of `op`, None or the reason why it cannot run here.

    The reason applies to a float32 call of a common shape on the default device, in which the
    caller names the implementation.

    Raises:
        ValueError: `op` is unknown.
    """
    if op not in TABLES:
        known = ", ".join(TABLES)
        raise ArgumentError(f"op={op!r} has no implementations to list; use one of: {known}.")
    dtype = jnp.dtype(jnp.float32)
    call = dispatch.Call(1, 128, 1, 128, 128, dtype, dispatch.platform(), named=True)
    return dispatch.refusals(TABLES[op], call)
