"""The op `mlstm` step by step: the reference, and the decode step."""

from xlstm_jax.cells.mlstm import MLSTMState, mlstm_scan
from xlstm_jax.ops.flags import Flags
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.typing import Array, Float


def mlstm_recurrent(
    x: Inputs, state: MLSTMState, flags: Flags, options: Options
) -> tuple[Float[Array, "B T H V"], MLSTMState]:
    """`cells.mlstm_scan`; `chunk_size` has no meaning here."""
    return mlstm_scan(
        *x,
        state,
        reset=flags.reset,
        mask=flags.mask,
        input_gate=options.input_gate,
        normalize=options.normalize,
        eps=options.eps,
    )
