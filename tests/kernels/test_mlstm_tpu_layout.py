"""Narrow heads share a tile of lanes in the mLSTM TPU kernels, without being padded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mlstm import backends, tpu_layout
from pallas_kernels.mlstm.tpu_layout import Heads
from pallas_kernels.mlstm.tpu_tiles import Tile
from tests.kernels import mlstm_cases
from tests.kernels.calls import calls
from tests.kernels.mlstm_cases import (
    STATES,
    STRICT,
    assert_results_match,
    in_bfloat16,
    make_case,
    reference,
)
from tests.ops.tolerances import TABLE

kernel = functools.partial(mlstm_cases.interpret, backends.tpu())
run = functools.partial(mlstm_cases.run, backends.tpu())

TILE = Tile(16, 8, 2)


@pytest.mark.parametrize(
    "H,K,width",
    [(2, 64, 64), (4, 32, 32), (3, 64, 128), (2, 32, 128), (8, 16, 128), (2, 48, 128)]
    + [(2, 128, 128), (2, 256, 256), (2, 200, 256)],
)
def test_only_heads_that_fill_a_tile_of_lanes_are_not_padded(H, K, width):
    assert tpu_layout.padded_widths(H, K, 96, 128) == (width, 128)


def test_lanes_of_each_head_are_selected_and_joined():
    heads, x = Heads(4, 2, 8), np.arange(1, 25, dtype=np.float32).reshape(3, 8)
    parts = [heads.only(jnp.asarray(x), head) for head in heads.indices]
    np.testing.assert_array_equal(sum(parts), x)
    for head, part in enumerate(parts):
        lanes = np.nonzero(np.asarray(part))[1]
        assert set(lanes.tolist()) == {2 * head, 2 * head + 1}
    joined = heads.join([jnp.asarray(x + head) for head in heads.indices])
    np.testing.assert_array_equal(joined, x + np.array([[0, 0, 1, 1, 2, 2, 3, 3]]))


def test_heads_that_share_a_tile_match_the_recurrence_quickly():
    case = make_case(B=1, T=9, H=2, K=4, flags=True)
    assert_results_match(kernel(case), reference(case))


SHARED = {"two heads": dict(H=2, K=4), "two of two heads": dict(H=4, K=4), "four": dict(H=4, K=2)}
shared = pytest.mark.parametrize("sizes", SHARED.values(), ids=SHARED)


@pytest.mark.slow
@shared
@pytest.mark.parametrize("options", [{}, {"input_gate": "sigmoid", "normalize": False}], ids=str)
def test_heads_that_share_a_tile_match_the_recurrence(sizes, options):
    """An odd length; two blocks of chunks, with resets and masked steps."""
    case = make_case(T=61, flags=True, **sizes)
    assert_results_match(kernel(case, tile=TILE, **options), reference(case, **options))


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("interpreter", STRICT.values(), ids=STRICT)
def test_kernels_have_no_uninitialized_reads_or_races(state, interpreter, capfd):
    case = state(make_case(B=1, T=21, H=4, K=4, flags=True))
    actual = kernel(case, interpreter=interpreter, tile=Tile(8, 8, 1))
    assert_results_match(actual, reference(case))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype,state", [("float32", "zero, final state unused"), ("bfloat16", "given")]
)
def test_heads_of_64_match_the_recurrence(dtype, state):
    case = STATES[state](make_case(B=1, T=150, H=2, K=64, V=128, flags=True))
    case = in_bfloat16(case)
    actual = kernel(in_bfloat16(case, dtype), lanes=128, chunk_size=128)
    assert_results_match(actual, reference(case), TABLE[dtype])


@pytest.mark.slow
@shared
def test_the_last_heads_of_a_block_do_not_affect_the_first(sizes):
    """h and all gradients of head 0 are bit-identical if every other head has other inputs."""
    case = make_case(T=21, flags=True, **sizes)
    other = make_case(T=21, seed=1, **sizes)

    def mix(a, b, axis):
        first = np.arange(a.shape[axis]).reshape((-1,) + (1,) * (a.ndim - axis - 1)) == 0
        return np.where(first, a, b)

    fields = {name: mix(getattr(case, name), getattr(other, name), 2) for name in "qkvif"}
    fields["dh"] = mix(case.dh, other.dh, 2)
    for name in ("state", "dstate"):
        pairs = zip(getattr(case, name), getattr(other, name), strict=True)
        fields[name] = tuple(mix(a, b, 1) for a, b in pairs)
    expected, actual = kernel(case), kernel(case._replace(**fields))
    for name, value in expected.items():
        axis = 1 if name.lstrip("d") in mlstm_cases.LEAVES else 2
        np.testing.assert_array_equal(actual[name].take(0, axis), value.take(0, axis), name)


@pytest.mark.slow
@pytest.mark.parametrize("V", [8, 10], ids="V{}".format)
def test_kernels_read_and_write_queries_and_keys_of_their_own_width(V):
    """Also the states that are saved at chunk starts; only values are padded."""
    B, T, H, K = 2, 16, 4, 4
    case = jax.tree.map(jnp.asarray, make_case(B, T, H, K, V))
    forward, backward = calls(jax.grad(lambda c: run(c)[0].sum(), allow_int=True), case)
    padded = 8 * -(-V // 8)
    shape = lambda v: v.aval.shape  # noqa: E731
    assert [shape(v) for v in forward.invars[1:4]] == [(B, T, H * K)] * 2 + [(B, T, H * padded)]
    assert shape(forward.outvars[4]) == (B, H // 2, 1, 2 * K, padded)
    assert [shape(v) for v in backward.outvars[:2]] == [(B, T, H * K)] * 2
