"""Where documents begin: on one device, and with the time of a row cut over several."""

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax import ops
from xlstm_jax.sharding import get_rules, make_mesh, use_rules


def test_document_starts_are_changes_after_the_first_token():
    ids = jnp.array([[1, 1, 2, 3, 0, 0], [0, 0, 1, 1, 2, 2], [1, 0, 2, 2, 2, 2]])
    assert ops.document_starts(ids).astype(int).tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 0],
    ]


def test_documents_begin_where_they_do_in_one_piece(rng):
    """With padding before, between and after them, and spans of nothing else."""
    T = 48
    ids = rng.integers(0, 3, (16, T)).astype(np.int32)
    ids[::2] = np.sort(ids[::2], axis=1)
    ids[1::4, : T // 2] = 0
    expected = ops.document_starts(jnp.asarray(ids))
    with use_rules(get_rules("fsdp_seq")), jax.set_mesh(make_mesh(data=1, seq=8)):
        found = jax.jit(ops.document_starts)(ids)
    np.testing.assert_array_equal(found, expected)
    assert len(found.addressable_shards[0].data[0]) == T // 8
