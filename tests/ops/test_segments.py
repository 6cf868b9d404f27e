"""Sequence split: computing segments of a sequence in parallel does not change results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES
from pallas_kernels.mlstm import mosaic_tiles
from tests import quick
from tests.ops import runs, tolerances
from tests.ops.subjects import (
    OPTIONS,
    RANGE_F,
    RANGE_I,
    RANGE_LOG_F,
    L,
    Subject,
    T,
    from_initial_state,
    implementations,
    interpreted,
    make_case,
    pad,
    replace_third,
    with_flags,
)
from tests.ops.tolerances import TABLE
from xlstm_jax import ops
from xlstm_jax.ops.dispatch import Implementation
from xlstm_jax.ops.mlstm import segments
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS
from xlstm_jax.ops.mlstm.arguments import Inputs, Options
from xlstm_jax.sharding import make_mesh

LENGTHS = (1, 7, 16)
"""Lengths of segments: all start states are composed; the last segment is padded; or is short."""

VARIANTS = [name for name in OPTIONS if name.startswith("mlstm")]


def name_of(inner: str, length: int) -> str:
    return f"{inner} in segments of {length}"


def in_segments(inner: str, length: int) -> Implementation:
    def compute(*args):
        if inner == "chunkwise":
            return segments.in_segments(IMPLEMENTATIONS[inner].fn, length, *args)
        with interpreted():
            return segments.in_segments(IMPLEMENTATIONS[inner].fn, length, *args)

    return Implementation(compute)


@pytest.fixture(autouse=True, scope="module")
def split_implementations():
    """Adds implementations that always split to the table of the op."""
    added = {
        name_of(inner, length): in_segments(inner, length)
        for inner in ("chunkwise", "triton")
        for length in LENGTHS
    }
    IMPLEMENTATIONS.update(added)
    yield
    for name in added:
        del IMPLEMENTATIONS[name]


every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_length = pytest.mark.parametrize("length", LENGTHS, ids="L{}".format)


def chunkwise(variant: str, length: int) -> Subject:
    return Subject(variant, name_of("chunkwise", length))


@every_length
@every_variant
def test_segments_equal_the_float64_recurrence_up_to_rounding(variant, length):
    """Values, final state and all gradients, with resets, masks and an initial state; eps = 0."""
    subject = chunkwise(variant, length)
    case = with_flags(make_case(variant, T), num_masked=13)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float64"], "float64", eps=0.0)


@every_variant
def test_flags_and_initial_state_are_optional(variant):
    """Without them the padding of the last segment closes the input gates, below any other."""
    subject, case = chunkwise(variant, 7), from_initial_state(make_case(variant, T))
    case.inputs["i"] -= 10
    runs.assert_equals_the_recurrence(
        subject, case, TABLE["float32"], "float32", stored=True, chunk_size=4
    )


@pytest.mark.parametrize("kind", ["resets", "masks"])
@pytest.mark.parametrize("variant", ["mlstm", "mlstm_exp"])
def test_resets_at_boundaries_and_masked_segments_equal_the_recurrence(variant, kind):
    case = pad(make_case(variant, T), T)
    if kind == "resets":
        case.reset[0, [7, 14, 20, 28]] = True
        case.reset[1, [0, 6, 13, 21]] = True
    else:
        case.mask[0, 6:22] = False  # two full segments, and a part of two others
        case.mask[1, 21:] = False  # the last ones
    subject = chunkwise(variant, 7)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float64"], "float64", eps=0.0)


@every_length
@pytest.mark.parametrize("variant", ["mlstm", "mlstm_exp", "mlstm_sigmoid"])
def test_gates_from_minus_infinity_to_1e30_equal_the_recurrence(variant, length):
    """A third of the gates is extreme; no input gate opens for more than a segment."""
    case = make_case(variant, T)
    rng = np.random.default_rng(2)
    range_f = RANGE_LOG_F if variant == "mlstm_exp" else RANGE_F
    for name, values in (("i", RANGE_I), ("f", range_f)):
        replace_third(rng, case.inputs[name], values)
    case.inputs["i"][0, :9] = -np.inf
    for start in (case, with_flags(from_initial_state(case), num_masked=3)):
        runs.assert_equals_the_recurrence(
            chunkwise(variant, length), start, TABLE["float32, large gates"]
        )


def test_nothing_is_read_before_the_first_write():
    """The initial state is forgotten, and no input gate opens for two segments."""
    case = make_case("mlstm", T)
    case.inputs["f"][:, 0], case.inputs["i"][:, :14] = -np.inf, -np.inf
    runs.assert_equals_the_recurrence(chunkwise("mlstm", 7), case, TABLE["float32"])


def test_growing_states_are_carried_exactly():
    """m grows to about 1e6: a sum of log f would round the weight of the state, which is 1."""
    case = make_case("mlstm_exp", T)
    case.inputs["f"] = np.abs(np.float32(1e5) * case.inputs["f"])
    cotangents = runs.random_cotangents("mlstm_exp", case)
    cotangents = runs.zero_cotangents("mlstm_exp", case)._replace(h=cotangents.h)
    expected = runs.run_reference("mlstm_exp", case, cotangents)
    actual = runs.run(chunkwise("mlstm_exp", 7), case, cotangents)
    tol = TABLE["float32, large gates"]
    tolerances.assert_close(actual.h, expected.h, tol.h, "h")
    tolerances.assert_gradients_close(actual.gradients, expected.gradients, tol)


@pytest.mark.parametrize("gate", [-1e9, 30.0])
@pytest.mark.parametrize("variant", ["mlstm", "mlstm_exp"])
def test_constant_forget_gates_equal_the_recurrence(variant, gate):
    """Every state but the last is forgotten, or none; an exponential gate grows the state."""
    case = make_case(variant, T)
    case.inputs["f"][...] = gate
    runs.assert_equals_the_recurrence(
        chunkwise(variant, 7), case, TABLE["float32, large gates"], "float32"
    )


def test_growing_states_keep_their_digits():
    """log f is mostly positive, so that m grows to about 100: sums of log f do not enter."""
    case = make_case("mlstm_exp", T)
    case.inputs["f"] += np.float32(4.5)
    subject = chunkwise("mlstm_exp", 7)
    runs.assert_equals_the_recurrence(subject, case, TABLE["float64"], "float64", eps=0.0)


def test_bfloat16_equals_the_recurrence():
    case = with_flags(make_case("mlstm", T), num_masked=13)
    subject = chunkwise("mlstm", 7)
    cotangents = runs.random_cotangents("mlstm", case)
    inputs = {
        name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
        for name, x in case.inputs.items()
    }
    actual = runs.run(subject, case, cotangents, "bfloat16")
    expected = runs.run_reference("mlstm", case._replace(inputs=inputs), cotangents)
    runs.assert_results_close(actual, expected, TABLE["bfloat16"])


@pytest.mark.parametrize("length", [7, 16], ids="L{}".format)
@pytest.mark.parametrize(
    "variant", ["mlstm", pytest.param("mlstm_exp", marks=pytest.mark.slow), "mlstm_unnormalized"]
)
def test_interpreted_kernels_in_segments_equal_the_recurrence(variant, length):
    refusal = implementations("mlstm")["triton"]
    if refusal is not None:
        pytest.skip(refusal)
    case = with_flags(make_case(variant, T), num_masked=13)
    subject = Subject(variant, name_of("triton", length))
    runs.assert_equals_the_recurrence(subject, case, TABLE["float32"], chunk_size=L)


def test_a_masked_sequence_returns_its_state_bit_for_bit():
    case = pad(make_case("mlstm", T), T)
    case.mask[...] = False
    actual = runs.run(chunkwise("mlstm", 7), case, runs.zero_cotangents("mlstm", case))
    for leaf, expected in zip(actual.state, case.state, strict=True):
        np.testing.assert_array_equal(leaf, expected)
    assert not actual.h.any()


def test_masked_nans_reach_no_result():
    case = with_flags(make_case("mlstm", T), num_masked=13)
    with_nans = {name: x.copy() for name, x in case.inputs.items()}
    for x in with_nans.values():
        x[~case.mask] = np.nan
    subject, cotangents = chunkwise("mlstm", 7), runs.random_cotangents("mlstm", case)
    expected = runs.run(subject, case, cotangents)
    actual = runs.run(subject, case._replace(inputs=with_nans), cotangents)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def call(inputs, state, implementation):
    """h and the last state, of inputs `q k v i f`."""
    return ops.mlstm(*inputs, state, chunk_size=4, implementation=implementation)


def value_and_gradient(wrap, implementation):
    """A function of inputs and state: outputs, and gradients of a loss of all of them."""

    def evaluate(inputs, state):
        fn = wrap(functools.partial(call, implementation=implementation))
        outputs, pullback = jax.vjp(fn, inputs, state)
        return outputs, pullback(jax.tree.map(jnp.cos, outputs))

    return evaluate


WRAPPERS = {
    "checkpoint": jax.checkpoint,
    "vmap": lambda fn: fn,
    "scan": lambda fn: (
        lambda inputs, state: jax.lax.scan(
            lambda carry, args: (carry, fn(*args)), None, (inputs, state)
        )[1]
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_segments_support_transformations(name):
    case = make_case("mlstm", T)
    args = jax.tree.map(jnp.float32, (tuple(case.inputs.values()), case.state))
    if name != "checkpoint":
        args = jax.tree.map(lambda x: jnp.stack([x, -x]), args)
    results = []
    for implementation in (name_of("chunkwise", 7), "chunkwise"):
        evaluate = value_and_gradient(WRAPPERS[name], implementation)
        results.append(quick.jit(jax.vmap(evaluate) if name == "vmap" else evaluate)(*args))
    split, unsplit = results
    for actual, expected in zip(jax.tree.leaves(split), jax.tree.leaves(unsplit), strict=True):
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize(
    "axes", [dict(data=2, fsdp=2, tensor=2), dict(data=2, seq=2, tensor=2)], ids=str
)
def test_segments_support_sharded_batch_heads_and_sequence(axes):
    case = make_case("mlstm", T - 1)
    args = jax.tree.map(jnp.float32, (tuple(case.inputs.values()), case.state))
    name = name_of("chunkwise", 7)
    lengths = []

    def compute(x: Inputs, *rest):
        lengths.append((*x.q.shape[:3],))
        return in_segments("chunkwise", 7).fn(x, *rest)

    expected = quick.jit(value_and_gradient(lambda fn: fn, "chunkwise"))(*args)
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh(**axes)):
        patch.setitem(IMPLEMENTATIONS, name, Implementation(compute))
        actual = quick.jit(value_and_gradient(lambda fn: fn, name))(*args)
    assert set(lengths) == {(1, 14, 1) if "seq" in axes else (1, 28, 1)}  # local shapes
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


def test_initial_states_need_no_loop_over_segments():
    """All prefixes are one product: its size is that of the states, not S times that."""
    count, (B, H, K, V) = 64, (1, 2, 16, 16)
    state = jax.eval_shape(
        lambda: ops.mlstm(
            *(jnp.zeros((B, 1, H, w)) for w in (K, K, V)), *(jnp.zeros((B, 1, H)),) * 2
        )[1]
    )
    S = jax.ShapeDtypeStruct
    parts = segments.Summary(
        *(S((count, *leaf.shape), leaf.dtype) for leaf in (state.m, state.m, state.C, state.n))
    )
    jaxpr = jax.make_jaxpr(segments._states_before)(parts, state)
    assert "scan" not in str(jaxpr) and "while" not in str(jaxpr)
    sizes = [var.aval.size for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars]
    assert max(sizes) == count * B * H * max(K * V, count**2)


@pytest.mark.parametrize(
    "T,programs,expected",
    [
        (65_536, 4, 2048),  # 32 segments, 128 programs
        (65_536, 1, 2048),  # the shortest segments
        (131_072, 4, 4096),
        (16_384, 4, 2048),
        (8192, 4, 2048),
        (100_000, 4, 3072),
        (8191, 1, 8191),  # too short for four segments
        (65_536, 33, 16_384),
        (65_536, 34, 65_536),  # three segments would not pay
        (65_536, 512, 65_536),  # the chip is full
    ],
)
def test_segments_fill_the_multiprocessors_of_a_hopper_gpu(T, programs, expected):
    assert ARCHITECTURES["sm_90"].multiprocessors == 132
    assert segments.segment_length(T, programs, 132) == expected


@pytest.mark.parametrize("T", [8192, 8200, 9000, 12_345, 65_537, 1_000_003])
@pytest.mark.parametrize("programs", [1, 3, 20, 33])
def test_segments_cover_the_sequence_with_little_padding(T, programs):
    length = segments.segment_length(T, programs, 132)
    count = -(-T // length)
    assert length % segments.MULTIPLE == 0 and length >= segments.MIN_LENGTH
    assert 2 <= count <= 132 // programs
    assert 0 <= count * length - T < 0.07 * T


def lengths_on(chip, B, T, H, *, interpret=False, **options):
    """The local lengths that the wrapped function is called with on a chip."""
    called = []

    def fn(x, state, flags, options):
        called.append(x.q.shape[:2])
        return x.v, state

    compute = segments.split_on_gpu(fn, lambda x, options: 1)
    zeros = lambda *shape: jnp.zeros(shape, jnp.bfloat16)  # noqa: E731

    def run():
        x = Inputs(*(zeros(B, T, H, 8) for _ in range(3)), *(zeros(B, T, H) for _ in range(2)))
        state = jax.tree.map(
            jnp.zeros_like,
            segments.MLSTMState(*(jnp.zeros(s) for s in ((B, H, 8, 8), (B, H, 8), (B, H)))),
        )
        return compute(x, state, segments.Flags(None, None), Options())

    with common.compiled_for(chip), common.interpreted(interpret):
        jax.eval_shape(run)
    return called


def test_the_rule_uses_local_shapes_and_the_chip():
    assert lengths_on("sm_90", 1, 65_536, 4) == [(32, 2048)]
    assert lengths_on("sm_90", 2, 65_536, 4) == [(2 * 16, 4096)]
    assert lengths_on("sm_89", 1, 65_536, 4) == [(14, 4736)]  # 58 multiprocessors
    assert lengths_on("sm_90", 16, 65_536, 8) == [(16, 65_536)]
    assert lengths_on("sm_90", 1, 1024, 4) == [(1, 1024)]
    assert lengths_on("sm_90", 1, 65_536, 4, interpret=True) == [(1, 65_536)]


def test_no_split_without_a_known_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "current_chip", lambda: None)
    assert lengths_on("sm_90", 1, 65_536, 4) == [(1, 65_536)]


@pytest.mark.parametrize("K,V,programs", [(64, 128, 1), (256, 512, 8), (128, 256, 2)])
def test_mosaic_tiles_count_their_programs(K, V, programs):
    tile = mosaic_tiles.choose(K, V, jnp.dtype("bfloat16"), 65_536, None)
    assert tile.states.programs(K, V) == programs
