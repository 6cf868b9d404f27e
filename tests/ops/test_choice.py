"""Dispatch for TPUs, GPUs and CPUs: the selection of "auto", and reasons of named kernels."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common, gpu
from tests.ops import runs
from xlstm_jax import ops
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS as MLSTM
from xlstm_jax.ops.slstm.api import IMPLEMENTATIONS as SLSTM

TABLES = {"mlstm": MLSTM, "slstm": SLSTM}
FALLBACK = {"mlstm": "chunkwise", "slstm": "recurrent"}

ON_GPUS = [op for op, table in TABLES.items() if "triton" in table]

on_a_tpu = pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
on_a_gpu = pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
both_ops = pytest.mark.parametrize("op", TABLES)
every_gpu_op = pytest.mark.parametrize("op", ON_GPUS)


def shapes(op: str, dtype, *, B=2, T=256, H=2, K=64) -> dict[str, jax.ShapeDtypeStruct]:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    if op == "slstm":
        return {"x": shape(B, T, 4, H, K), "r": shape(H, K, 4, K)}
    return dict.fromkeys("qkv", shape(B, T, H, K)) | dict.fromkeys("if", shape(B, T, H))


@pytest.fixture
def selected(monkeypatch):
    """A function that traces a call, and returns the selected implementation and the `Call`."""
    selections = []
    choose = dispatch.choose

    def spy(op, table, name, call):
        implementation = choose(op, table, name, call)
        names = [key for key, value in table.items() if value is implementation]
        selections.append((*names, call))
        return implementation

    monkeypatch.setattr(dispatch, "choose", spy)

    def trace(op, arguments, chip: str | None = None, **options):
        inside = common.compiled_for(chip) if chip else contextlib.nullcontext()
        with inside, jax.enable_x64(True):
            jax.eval_shape(lambda args: runs.OPS[op](**args, **options), arguments)
        return selections.pop()

    return trace


@pytest.fixture
def usable(monkeypatch):
    """As if Triton and jax-triton were installed: reasons are real, kernels are not compiled."""
    pytest.importorskip("triton")

    def call(kernel, arrays, out_shape, **_):
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    monkeypatch.setattr(gpu, "_environment_refusal", lambda chip: None)
    monkeypatch.setattr(gpu, "call", call)


def error_of(op: str, chip: str, arguments, implementation: str, **options) -> str:
    """The error message of a call that names the kernel."""
    with pytest.raises(NotImplementedError) as error, common.compiled_for(chip):
        with jax.enable_x64(True):
            compute = functools.partial(runs.OPS[op], implementation=implementation, **options)
            jax.eval_shape(lambda args: compute(**args), arguments)
    return str(error.value)


@on_a_tpu
@both_ops
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("T", [1, 200])
def test_auto_selects_the_kernels_on_a_tpu(selected, op, chip, dtype, T):
    name, call = selected(op, shapes(op, dtype, T=T), chip)
    assert (name, call.platform) == ("pallas_tpu", "tpu")


@both_ops
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_does_not_select_kernels_on_a_cpu(selected, op, dtype):
    name, call = selected(op, shapes(op, dtype))
    assert (name, call.platform) == (FALLBACK[op], "cpu")


REFUSED = {
    "float16": ("float16", {}, {}, "float16 overflows in exponential gates"),
    "float64": ("float64", {}, {}, "it computes with float32 and bfloat16, not with float64"),
    "too wide": ("bfloat16", {"K": 8192}, {}, "use more heads"),
}
CHUNK = ("bfloat16", {}, {"chunk_size": 100}, "chunk_size=100 is not a multiple of 128")
CASES = [(op, *case) for op in TABLES for case in REFUSED.values()] + [("mlstm", *CHUNK)]
IDS = [f"{op}-{name}" for op in TABLES for name in REFUSED] + ["mlstm-chunk_size"]


@on_a_tpu
@pytest.mark.parametrize("op,dtype,sizes,options,reason", CASES, ids=IDS)
def test_auto_falls_back_and_a_named_tpu_kernel_raises_for_unsupported_calls(
    selected, chip, op, dtype, sizes, options, reason
):
    """The message has the reason that `dispatch.refusals` gives."""
    arguments = shapes(op, dtype, **sizes)
    assert_auto_falls_through(selected, op, chip, arguments, "pallas_tpu", reason, **options)


def assert_auto_falls_through(selected, op, chip, arguments, kernel, reason, **options):
    """To the fallback for all platforms; the reason against the kernel contains `reason`."""
    name, call = selected(op, arguments, chip, **options)
    platform = "gpu" if kernel == "triton" else "tpu"
    assert (name, call.platform) == (FALLBACK[op], platform)
    with common.compiled_for(chip):
        reasons = dispatch.refusals(TABLES[op], call)
    assert reason in reasons[kernel]
    assert reasons[FALLBACK[op]] is None
    message = error_of(op, chip, arguments, kernel, **options)
    assert message.startswith(f"no requested implementation of {op} supports ")
    assert message.endswith(f": {kernel}: {reasons[kernel]}.")


@on_a_gpu
@every_gpu_op
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("T", [1, 200])
def test_auto_selects_the_kernels_on_a_gpu(usable, selected, op, chip, dtype, T):
    name, call = selected(op, shapes(op, dtype, T=T), chip)
    assert (name, call.platform) == ("triton", "gpu")


def test_gpu_kernels_support_heads_of_any_width(usable, selected):
    for K in (1, 100, 8192):
        assert selected("mlstm", shapes("mlstm", "bfloat16", K=K), "sm_80")[0] == "triton"


REFUSED_BY_TRITON = {name: case for name, case in REFUSED.items() if name != "too wide"}
CHUNK_BY_TRITON = ("bfloat16", {}, {"chunk_size": 100}, "chunk_size=100 is not a multiple of 64")
CASES = [(op, *case) for op in ON_GPUS for case in REFUSED_BY_TRITON.values()]
IDS = [f"{op}-{name}" for op in ON_GPUS for name in REFUSED_BY_TRITON] + ["mlstm-chunk_size"]


@on_a_gpu
@pytest.mark.parametrize(
    "op,dtype,sizes,options,reason", [*CASES, ("mlstm", *CHUNK_BY_TRITON)], ids=IDS
)
def test_auto_falls_back_and_named_triton_raises_for_unsupported_calls(
    usable, selected, chip, op, dtype, sizes, options, reason
):
    arguments = shapes(op, dtype, **sizes)
    assert_auto_falls_through(selected, op, chip, arguments, "triton", reason, **options)


@on_a_gpu
@every_gpu_op
@pytest.mark.parametrize("T", [1, 200])
def test_auto_falls_back_on_a_gpu_without_triton(monkeypatch, selected, op, chip, T):
    reason = "jax-triton is not installed; install it"
    monkeypatch.setattr(gpu, "_environment_refusal", lambda chip: reason)
    arguments = shapes(op, "bfloat16", T=T)
    assert_auto_falls_through(selected, op, chip, arguments, "triton", reason)
    with common.compiled_for(chip):
        assert ops.implementations(op)["triton"] == reason


@every_gpu_op
@pytest.mark.parametrize("T", [1, 200])
def test_auto_falls_back_on_an_amd_gpu(monkeypatch, selected, op, T):
    kind = "AMD Instinct MI250X"
    device = SimpleNamespace(device_kind=kind, platform="gpu", compute_capability="gfx90a")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    name, call = selected(op, shapes(op, "bfloat16", T=T))
    assert (name, call.platform) == (FALLBACK[op], "gpu")
    reason = f"it is compiled for NVIDIA GPUs only, not for {kind!r}, an AMD GPU (ROCm)"
    assert ops.implementations(op)["triton"] == reason


def test_gpu_kernels_support_chunk_sizes_that_are_multiples_of_the_tile(usable, selected):
    arguments = shapes("mlstm", "bfloat16")
    for chunk_size in (64, 128, 192):
        assert selected("mlstm", arguments, "sm_90", chunk_size=chunk_size)[0] == "triton"


@both_ops
def test_implementations_depends_on_the_target(op):
    with common.compiled_for("v5e"):
        assert ops.implementations(op)["pallas_tpu"] is None
    assert ops.implementations(op)["pallas_tpu"] == "it runs on a TPU, not on 'cpu'"
    with common.interpreted(lanes=8):
        assert ops.implementations(op)["pallas_tpu"] is None


@every_gpu_op
def test_implementations_names_the_platform_that_a_kernel_needs(monkeypatch, usable, op):
    assert ops.implementations(op)["triton"] == "it runs on a GPU, not on 'cpu'"
    with common.compiled_for("v5e"):
        assert ops.implementations(op)["triton"] == "it runs on a GPU, not on 'tpu'"
    with common.compiled_for("sm_90"):
        assert ops.implementations(op)["triton"] is None
        assert ops.implementations(op)["pallas_tpu"] == "it runs on a TPU, not on 'gpu'"
    for refusal in (None, "Triton compiles here"):
        monkeypatch.setattr(gpu, "interpreter_refusal", lambda refusal=refusal: refusal)
        with common.interpreted(lanes=8):
            assert ops.implementations(op)["triton"] == refusal


def test_float64_gate_makes_the_call_float64(selected):
    arguments = shapes("mlstm", "float32")
    arguments["i"] = jax.ShapeDtypeStruct(arguments["i"].shape, jnp.float64)
    for chip in ("v5e", "sm_90"):
        name, call = selected("mlstm", arguments, chip)
        assert (name, call.dtype) == ("chunkwise", jnp.dtype("float64"))


def test_selection_depends_on_the_promoted_dtype(selected):
    """A float32 query promotes the call to float32, in which these heads do not fit a v4."""
    arguments = shapes("mlstm", "bfloat16", K=640)
    assert selected("mlstm", arguments, "v4")[0] == "pallas_tpu"
    q = jax.ShapeDtypeStruct(arguments["q"].shape, "float32")
    assert selected("mlstm", {**arguments, "q": q}, "v4")[0] == "chunkwise"
