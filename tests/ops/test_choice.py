"""What "auto" chooses where a program is meant for a TPU or a GPU, and what named kernels say."""

import contextlib
import functools

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
def chosen(monkeypatch):
    """A function that traces a call and gives the name of what was chosen, and what it saw."""
    seen = []
    choose = dispatch.choose

    def spy(op, table, name, call):
        implementation = choose(op, table, name, call)
        names = [key for key, value in table.items() if value is implementation]
        seen.append((*names, call))
        return implementation

    monkeypatch.setattr(dispatch, "choose", spy)

    def trace(op, arguments, chip: str | None = None, **options):
        inside = common.compiled_for(chip) if chip else contextlib.nullcontext()
        with inside, jax.enable_x64(True):
            jax.eval_shape(lambda args: runs.OPS[op](**args, **options), arguments)
        return seen.pop()

    return trace


@pytest.fixture
def usable(monkeypatch):
    """As if Triton and jax-triton were here: judgments are real, kernels are not compiled."""
    pytest.importorskip("triton")

    def call(kernel, arrays, out_shape, **_):
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out_shape)

    monkeypatch.setattr(gpu, "_environment_refusal", lambda: None)
    monkeypatch.setattr(gpu, "call", call)


def refused(op: str, chip: str, arguments, implementation: str, **options) -> str:
    """What is said where the kernel is asked for by its name."""
    with pytest.raises(NotImplementedError) as error, common.compiled_for(chip):
        with jax.enable_x64(True):
            compute = functools.partial(runs.OPS[op], implementation=implementation, **options)
            jax.eval_shape(lambda args: compute(**args), arguments)
    return str(error.value)


@on_a_tpu
@both_ops
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("T", [1, 200])
def test_on_a_tpu_auto_chooses_the_kernels(chosen, op, chip, dtype, T):
    name, call = chosen(op, shapes(op, dtype, T=T), chip)
    assert (name, call.platform) == ("pallas_tpu", "tpu")


@both_ops
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_elsewhere_auto_does_not(chosen, op, dtype):
    name, call = chosen(op, shapes(op, dtype))
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
@pytest.mark.parametrize("op,dtype,sizes,options,sentence", CASES, ids=IDS)
def test_what_no_kernel_serves_auto_computes_otherwise_and_a_name_refuses(
    chosen, chip, op, dtype, sizes, options, sentence
):
    """With the sentence that the table of refusals has."""
    arguments = shapes(op, dtype, **sizes)
    assert_auto_falls_through(chosen, op, chip, arguments, "pallas_tpu", sentence, **options)


def assert_auto_falls_through(chosen, op, chip, arguments, kernel, sentence, **options):
    """To what every machine can compute; the kernel refuses with a sentence that has this one."""
    name, call = chosen(op, arguments, chip, **options)
    platform = "gpu" if kernel == "triton" else "tpu"
    assert (name, call.platform) == (FALLBACK[op], platform)
    with common.compiled_for(chip):
        reasons = dispatch.refusals(TABLES[op], call)
    assert sentence in reasons[kernel]
    assert reasons[FALLBACK[op]] is None
    said = refused(op, chip, arguments, kernel, **options)
    assert said.startswith(f"{op} cannot serve ")
    assert said.endswith(f": {kernel}: {reasons[kernel]}.")


@on_a_gpu
@every_gpu_op
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("T", [1, 200])
def test_on_a_gpu_auto_chooses_the_kernels(usable, chosen, op, chip, dtype, T):
    name, call = chosen(op, shapes(op, dtype, T=T), chip)
    assert (name, call.platform) == ("triton", "gpu")


def test_heads_of_any_width_are_computed_by_the_kernels_of_a_gpu(usable, chosen):
    for K in (1, 100, 8192):
        assert chosen("mlstm", shapes("mlstm", "bfloat16", K=K), "sm_80")[0] == "triton"


REFUSED_BY_TRITON = {name: case for name, case in REFUSED.items() if name != "too wide"}
CHUNK_BY_TRITON = ("bfloat16", {}, {"chunk_size": 100}, "chunk_size=100 is not a multiple of 64")
CASES = [(op, *case) for op in ON_GPUS for case in REFUSED_BY_TRITON.values()]
IDS = [f"{op}-{name}" for op in ON_GPUS for name in REFUSED_BY_TRITON] + ["mlstm-chunk_size"]


@on_a_gpu
@pytest.mark.parametrize(
    "op,dtype,sizes,options,sentence", [*CASES, ("mlstm", *CHUNK_BY_TRITON)], ids=IDS
)
def test_what_triton_does_not_serve_auto_computes_otherwise_and_a_name_refuses(
    usable, chosen, chip, op, dtype, sizes, options, sentence
):
    arguments = shapes(op, dtype, **sizes)
    assert_auto_falls_through(chosen, op, chip, arguments, "triton", sentence, **options)


@on_a_gpu
@every_gpu_op
@pytest.mark.parametrize("T", [1, 200])
def test_a_gpu_without_the_packages_computes_otherwise_and_says_why(
    monkeypatch, chosen, op, chip, T
):
    sentence = "jax-triton is not installed; a way out"
    monkeypatch.setattr(gpu, "_environment_refusal", lambda: sentence)
    arguments = shapes(op, "bfloat16", T=T)
    assert_auto_falls_through(chosen, op, chip, arguments, "triton", sentence)
    with common.compiled_for(chip):
        assert ops.implementations(op)["triton"] == sentence


def test_a_multiple_of_the_tile_is_a_chunk_of_the_kernels_of_a_gpu(usable, chosen):
    arguments = shapes("mlstm", "bfloat16")
    for chunk_size in (64, 128, 192):
        assert chosen("mlstm", arguments, "sm_90", chunk_size=chunk_size)[0] == "triton"


@both_ops
def test_the_list_of_implementations_follows_what_a_program_is_meant_for(op):
    with common.compiled_for("v5e"):
        assert ops.implementations(op)["pallas_tpu"] is None
    assert ops.implementations(op)["pallas_tpu"] == "it runs on a TPU, not on 'cpu'"
    with common.interpreted(lanes=8):
        assert ops.implementations(op)["pallas_tpu"] is None


@every_gpu_op
def test_the_list_of_implementations_names_the_kind_of_chip_that_a_kernel_needs(
    monkeypatch, usable, op
):
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


def test_a_float64_gate_makes_a_call_wide(chosen):
    arguments = shapes("mlstm", "float32")
    arguments["i"] = jax.ShapeDtypeStruct(arguments["i"].shape, jnp.float64)
    for chip in ("v5e", "sm_90"):
        name, call = chosen("mlstm", arguments, chip)
        assert (name, call.dtype) == ("chunkwise", jnp.dtype("float64"))


def test_what_is_judged_is_the_dtype_that_is_computed_with(chosen):
    """Heads that fit a v4 in bfloat16 do not in float32, which a float32 query makes of them."""
    arguments = shapes("mlstm", "bfloat16", K=640)
    assert chosen("mlstm", arguments, "v4")[0] == "pallas_tpu"
    q = jax.ShapeDtypeStruct(arguments["q"].shape, "float32")
    assert chosen("mlstm", {**arguments, "q": q}, "v4")[0] == "chunkwise"
