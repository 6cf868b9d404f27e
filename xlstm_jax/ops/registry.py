"""What can run here: every implementation of every op, with the reason where it cannot."""

import jax.numpy as jnp

from xlstm_jax.ops import dispatch
from xlstm_jax.ops.lstm import IMPLEMENTATIONS as LSTM
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS as MLSTM
from xlstm_jax.ops.slstm.api import IMPLEMENTATIONS as SLSTM

TABLES = {
    "lstm": LSTM,
    "mlstm": MLSTM,
    "slstm": SLSTM,
}


def implementations(op: str) -> dict[str, str | None]:
    """For each implementation of `op`, None or the sentence why it cannot run here.

    Judged for a float32 call of a common shape on the default device, asked for by name.

    Raises:
        ValueError: there is no such op.
    """
    if op not in TABLES:
        known = ", ".join(TABLES)
        raise ValueError(f"op={op!r} has no implementations to list; use one of: {known}.")
    dtype = jnp.dtype(jnp.float32)
    call = dispatch.Call(1, 128, 1, 128, 128, dtype, dispatch.platform(), named=True)
    return dispatch.refusals(TABLES[op], call)
