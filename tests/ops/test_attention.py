"""Implementations of attention that support a part of the calls: cuDNN, splash, and decoding."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels import common
from tests import quick
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import ops
from xlstm_jax.cells.attention import AttentionState, attention_init
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.attention import api, kernels
from xlstm_jax.ops.dispatch import Implementation

B, T, H, GROUPS, K = 2, 200, 4, 2, 16  # T is not a multiple of the blocks
RESETS, MASKS = ("reset",), ("mask",)
CASES = {
    "causal": ((), dict(window=T)),
    "sinks in the window": ((), dict(window=T, num_sinks=3)),
    "window": ((), dict(window=30)),
    "documents": (RESETS, dict(window=T)),
    "documents, window": (RESETS, dict(window=30)),
    "mask": (MASKS, dict(window=T)),
    "documents, mask": (RESETS + MASKS, dict(window=2 * T)),
}
CUDNN_ONLY = {"documents, mask, window": (RESETS + MASKS, dict(window=30))}
QUICK = ("window", "documents, mask")


def cases(table):
    """Parametrizes a test over calls; most are slow."""
    marks = {name: [] if name in QUICK else [pytest.mark.slow] for name in table}
    values = [pytest.param(*case, id=name, marks=marks[name]) for name, case in table.items()]
    return pytest.mark.parametrize("flags,options", values)


def arguments(V: int = K, dtype=jnp.float32, length: int = T):
    """Queries, keys, values, and flags."""
    rng = np.random.default_rng(V)
    normal = lambda *sizes: jnp.asarray(rng.standard_normal((B, length, *sizes)), dtype)  # noqa: E731
    flags = {"reset": rng.random((B, length)) < 0.03, "mask": rng.random((B, length)) < 0.8}
    return (normal(H, K), normal(GROUPS, K), normal(GROUPS, V)), flags


def evaluate(implementation: str, flags, options, V: int = K):
    """y and the cache, and the gradients of q, k and v for a loss on all of them."""
    (q, k, v), all_flags = arguments(V)
    chosen = {name: all_flags[name] for name in flags}

    def call(q, k, v):
        y, state = ops.attention(q, k, v, **chosen, **options, implementation=implementation)
        return {"y": y, "k": state.k, "v": state.v}, state.length

    def compute(q, k, v):
        results, pullback, length = jax.vjp(call, q, k, v, has_aux=True)
        return results | {"length": length}, pullback(jax.tree.map(jnp.cos, results))

    with common.interpreted():
        results, grads = quick.jit(compute)(q, k, v)
    return jax.tree.map(np.asarray, (results, dict(zip("qkv", grads, strict=True))))


def assert_same(actual, expected):
    for name, value in expected[0].items():
        assert_close(actual[0][name], value, TABLE["float32"].h, name)
    assert_gradients_close(actual[1], expected[1], TABLE["float32"])


@cases(CASES)
def test_splash_attention_equals_blockwise(flags, options):
    expected = evaluate("blockwise", flags, options, V=24)
    assert_same(evaluate("splash", flags, options, V=24), expected)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """`"cudnn"` with its arguments passed to XLA's implementation, on any device."""
    compute = functools.partial(kernels.attention_cudnn, implementation="xla")
    monkeypatch.setitem(api.IMPLEMENTATIONS, "cudnn", Implementation(compute))


@cases(CASES | CUDNN_ONLY)
def test_arguments_for_cudnn_give_the_results_of_blockwise(cudnn_by_xla, flags, options):
    assert_same(evaluate("cudnn", flags, options), evaluate("blockwise", flags, options))


@pytest.mark.parametrize("window,expected", [(T, None), (30, (29, 0))], ids=["causal", "window"])
def test_cudnn_gets_no_mask_for_a_call_without_flags(monkeypatch, cudnn_by_xla, window, expected):
    calls = []

    def spy(q, k, v, **options):
        calls.append(options)
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    ((_, k, v), _) = arguments()
    jax.eval_shape(functools.partial(ops.attention, window=window, implementation="cudnn"), k, k, v)
    assert calls[0]["mask"] is None and calls[0]["is_causal"]
    assert calls[0]["local_window_size"] == expected


@pytest.fixture
def with_cudnn(monkeypatch):
    """As if cuDNN were installed: calls are lowered and not compiled."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91300)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)


@pytest.mark.parametrize(
    "window,flags,expected",
    [
        (T, (), ['mask_type": "CAUSAL"', 'sliding_window_length": 0', "cudnn$fmhaSoftmaxBackward"]),
        (30, (), ['mask_type": "CAUSAL"', 'sliding_window_length": 30']),
        (30, RESETS, ['mask_type": "CAUSAL"', "cudnn$fmhaScaleBiasSoftmaxBackward"]),
    ],
    ids=["causal", "window", "documents"],
)
def test_cudnn_is_lowered_for_a_gpu(with_cudnn, window, flags, expected):
    args, all_flags = arguments(dtype=jnp.bfloat16)
    chosen = {name: all_flags[name] for name in flags}

    def loss(q, k, v):
        y, _ = ops.attention(q, k, v, window=window, **chosen, implementation="cudnn")
        return y.astype(jnp.float32).sum()

    with common.compiled_for("sm_90"):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    text = text.replace("\\22", '"')
    assert [part for part in expected if part not in text] == []


def call(platform: str, **changes) -> dispatch.Call:
    """A call that the kernels of a platform support."""
    first = dispatch.Call(B, T, H, 64, 64, jnp.dtype("bfloat16"), platform)
    return dataclasses.replace(first, **changes)


REFUSALS = [
    ("cudnn", dict(platform="cpu"), "it runs on a GPU, not on 'cpu'"),
    ("cudnn", dict(dtype=jnp.dtype("float32")), "bfloat16 and float16, not with float32"),
    ("cudnn", dict(dtype=jnp.dtype("float64")), "bfloat16 and float16, not with float64"),
    ("cudnn", dict(K=60, V=60), "a multiple of 8 up to 256, got K=60 and V=60"),
    ("cudnn", dict(V=128), "of one width"),
    ("cudnn", dict(K=192, V=192), "head dim must be <= 128"),  # before Hopper; from JAX
    ("cudnn", dict(uses=frozenset({"state"})), "pass state=None"),
    ("cudnn", dict(uses=frozenset({"num_sinks"})), "pass num_sinks=0"),
    ("cudnn", dict(uses=frozenset({"reset"})), "name 'cudnn'"),
    ("cudnn", dict(check_vma=True), "pass check_vma=False"),
    ("splash", dict(platform="gpu"), "it runs on a TPU, not on 'gpu'"),
    ("splash", dict(dtype=jnp.dtype("float32")), "in bfloat16, not in float32"),
    ("splash", dict(uses=frozenset({"mask", "window"})), "do not count towards the window"),
    ("splash", dict(uses=frozenset({"state"})), "pass state=None"),
    ("splash", dict(check_vma=True), "pass check_vma=False"),
    ("decode", {}, "it computes one step, not T=200"),
]


@pytest.mark.parametrize("name,changes,reason", REFUSALS)
def test_unsupported_calls_are_refused_with_the_reason(with_cudnn, name, changes, reason):
    supported = {"platform": "gpu" if name == "cudnn" else "tpu"}
    assert reason in api.IMPLEMENTATIONS[name].unsupported(call(**supported | changes))


def test_a_missing_cudnn_is_refused_with_the_reason_of_jax(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
    assert kernels.cudnn_refusal(call("gpu")) == "cuDNN is not detected"


SELECTED = {
    "gpu": ("sm_90", {}, "cudnn"),
    "gpu, window": ("sm_90", dict(window=30), "cudnn"),
    "gpu, documents": ("sm_90", dict(flags=RESETS), "blockwise"),
    "gpu, sinks": ("sm_90", dict(window=30, num_sinks=2), "blockwise"),
    "tpu": ("v5e", {}, "splash"),
    "tpu, documents": ("v5e", dict(flags=RESETS, window=30), "splash"),
    "tpu, float32": ("v5e", dict(dtype=jnp.float32), "blockwise"),
    "tpu, mask and window": ("v5e", dict(flags=MASKS, window=30), "blockwise"),
    "tpu, one step": ("v5e", dict(length=1), "decode"),
    "cpu": (None, {}, "blockwise"),
}


@pytest.mark.parametrize("chip,changes,expected", SELECTED.values(), ids=SELECTED)
def test_auto_selects_the_first_that_supports_the_call(
    monkeypatch, with_cudnn, chip, changes, expected
):
    choose, selected = dispatch.choose, []

    def spy(op, table, name, call):
        selected.append(choose(op, table, name, call))
        return selected[-1]

    monkeypatch.setattr(dispatch, "choose", spy)
    options = {"window": T, "flags": (), "dtype": jnp.bfloat16, "length": T} | changes
    flags = options.pop("flags")
    args, all_flags = arguments(dtype=options.pop("dtype"), length=options.pop("length"))
    options |= {name: all_flags[name] for name in flags}
    with common.compiled_for(chip) if chip else common.interpreted(False):
        jax.eval_shape(functools.partial(ops.attention, **options), *args)
    assert selected == [api.IMPLEMENTATIONS[expected]]


def step_arguments(window: int, num_sinks: int, dtype):
    """One step of four sequences, the second of which masks it and the third of which resets."""
    rng = np.random.default_rng(window)
    normal = lambda *sizes: jnp.asarray(rng.standard_normal((4, *sizes)), dtype)  # noqa: E731
    S = window + num_sinks
    length = jnp.asarray([0, S + 2, 3, S], jnp.int32)
    state = AttentionState(normal(GROUPS, S, K), normal(GROUPS, S, K), length)
    return (normal(1, H, K), normal(1, GROUPS, K), normal(1, GROUPS, K)), state


@pytest.mark.parametrize(
    "flags",
    [
        RESETS + MASKS,
        *(pytest.param(flags, marks=pytest.mark.slow) for flags in ((), MASKS, RESETS)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_sinks,dtype", [(0, jnp.float32), (2, jnp.bfloat16)])
def test_decoding_equals_the_scan_bit_for_bit(flags, num_sinks, dtype):
    args, state = step_arguments(6, num_sinks, dtype)
    all_flags = {"mask": np.array([1, 0, 1, 1]), "reset": np.array([0, 1, 1, 0])}
    chosen = {name: all_flags[name][:, None] for name in flags}
    compute = functools.partial(ops.attention, window=6, num_sinks=num_sinks)
    run = jax.jit(compute, static_argnames="implementation")
    y, new = run(*args, state, **chosen)
    expected_y, expected = run(*args, state, **chosen, implementation="recurrent")
    for actual, leaf in zip(new, expected, strict=True):
        assert actual.dtype == leaf.dtype and bool((actual == leaf).all())
    assert_close(np.asarray(y), np.asarray(expected_y), TABLE["float32"].h, "y")


@pytest.mark.parametrize("B,groups", [(4, 2), (1, 4), (1, 1)])
def test_decoding_updates_a_donated_cache_in_place(B, groups):
    assert cache_copies("auto", B, groups, 65_536) == 0


def test_the_scan_copies_its_cache():
    assert cache_copies("recurrent", 4, 2, 40) > 0  # what the test above counts


def cache_copies(implementation, B, groups, S):
    """Copies of a donated cache in one compiled step, with a mask, which generation passes."""
    K = 64

    def step(q, k, v, state, mask):
        return ops.attention(q, k, v, state, mask=mask, window=S, implementation=implementation)

    k, state = jnp.zeros((B, 1, groups, K)), attention_init(B, S, groups, K, K)
    args = k.repeat(2, axis=2), k, k, state, jnp.ones((B, 1), bool)
    # Without the options of tests, which disable the pass that removes copies.
    compiled = jax.jit(step, donate_argnums=3).lower(*args).compile()
    cache = state.k.nbytes + state.v.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes >= cache
    copied = rf"= f32\[{B},{groups},{S},{K}\]\S* (?:copy|select)\("
    return len(re.findall(copied, compiled.as_text()))
