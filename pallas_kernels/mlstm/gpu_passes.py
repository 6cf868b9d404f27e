"""mLSTM forward and backward passes on a GPU, as launches of two kernels, `states` and `outputs`.

Each pass first computes the states at chunk boundaries, then all positions in parallel. Triton and
Mosaic GPU kernels have the same arguments:

    outputs  lhs  rhs  values  state at      weight of the state
    h        q    k    v       chunk start   read
    dq       dh   v    k       chunk start   read     (state transposed)
    dk       v    dh   q       chunk end     write    (cotangent, transposed)
    dv       k    q    dh      chunk end     write    (cotangent)

    states   lhs  rhs  weight  starts at
    C        k    v    write   the first chunk
    dC       q    dh   read    the last chunk

Only the product of dh and v is computed twice, for dq and for dk, which sum it over different
positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from pallas_kernels.mlstm.options import Backward, Forward, Options


class Launches(NamedTuple):
    """The two kernels.

    `states` (options, packed, lhs, rhs, C, n, starts, *, dnorm) returns C `B H N K V` and
    n `B H N 1 K` at chunk boundaries, the last C and n, and the sums `B H N parts` of the gradient
    of the log scale. With `starts`, the states of the forward pass, it runs in reverse. The first
    C and n are None for zeros.

    `outputs` (options, name, packed, lhs, rhs, values, C, n, primal, *, normalize, dnorm) returns
    h, dq, dk or dv, `B T HW`, and its sums `B H parts T`.
    """

    states: Callable[..., Any]
    outputs: Callable[..., Any]


def forward(launches: Launches, options: Options, packed, q, k, v, C, n, *, save: bool) -> Forward:
    """The forward pass; see `options.Kernels`."""
    C_starts, n_starts, C, n, _ = launches.states(options, packed, k, v, C, n)
    normalize, arrays = options.normalize, (packed, q, k, v, C_starts, n_starts, v)
    h, d = launches.outputs(options, "h", *arrays, normalize=normalize)
    d = d[:, :, :1] if normalize else None
    return Forward(h, C, n, *((d, C_starts, n_starts) if save else [None] * 3))


def backward(
    launches: Launches, options: Options, packed, q, k, v, h, dh, C_starts, n_starts, dC, dn
) -> Backward:
    """The backward pass; see `options.Kernels`."""
    dnorm, saved = h is not None, (C_starts, n_starts)
    *ends, dC, dn, scaling = launches.states(options, packed, q, dh, dC, dn, saved, dnorm=dnorm)
    dq, q_dq = launches.outputs(options, "dq", packed, dh, v, k, *saved, q, dnorm=dnorm)
    dk, k_dk = launches.outputs(options, "dk", packed, v, dh, q, *ends, k, dnorm=dnorm)
    dv, _ = launches.outputs(options, "dv", packed, k, q, dh, *ends, v)
    return Backward(dq, dk, dv, k_dk, q_dq, scaling, dC, dn)
