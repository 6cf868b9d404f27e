"""Document starts, on a single device and with a sharded sequence."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import quick
from xlstm_jax import ops
from xlstm_jax.sharding import get_rules, make_mesh, use_rules

STARTS = quick.jit(ops.document_starts)


def test_document_starts_are_changes_of_the_id_after_the_first_token():
    ids = jnp.array([[1, 1, 2, 3, 0, 0], [0, 0, 1, 1, 2, 2], [1, 0, 2, 2, 2, 2]])
    assert STARTS(ids).astype(int).tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 0],
    ]


def test_sharded_sequence_has_the_document_starts_of_a_single_device(rng):
    """With padding before, between and after documents, and shards of padding only."""
    T = 48
    ids = rng.integers(0, 3, (16, T)).astype(np.int32)
    ids[::2] = np.sort(ids[::2], axis=1)
    ids[1::4, : T // 2] = 0
    expected = STARTS(jnp.asarray(ids))
    with use_rules(get_rules("fsdp_seq")), jax.set_mesh(make_mesh(data=1, seq=8)):
        starts = quick.jit(lambda ids: ops.document_starts(ids))(ids)
    np.testing.assert_array_equal(starts, expected)
    assert len(starts.addressable_shards[0].data[0]) == T // 8
