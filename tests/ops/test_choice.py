"""What "auto" chooses where a program is meant for a TPU, and what a named kernel says instead."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common
from tests.ops import runs
from xlstm_jax import ops
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.mlstm import IMPLEMENTATIONS as MLSTM
from xlstm_jax.ops.slstm import IMPLEMENTATIONS as SLSTM

TABLES = {"mlstm": MLSTM, "slstm": SLSTM}
FALLBACK = {"mlstm": "chunkwise", "slstm": "scan"}

on_a_tpu = pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
both_ops = pytest.mark.parametrize("op", TABLES)


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


def refused(op: str, chip: str, arguments, **options) -> str:
    """What is said where the kernel is asked for by its name."""
    with pytest.raises(NotImplementedError) as error, common.compiled_for(chip):
        with jax.enable_x64(True):
            call = lambda args: runs.OPS[op](**args, implementation="pallas_tpu", **options)  # noqa: E731
            jax.eval_shape(call, arguments)
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
    name, call = chosen(op, arguments, chip, **options)
    assert (name, call.platform) == (FALLBACK[op], "tpu")
    with common.compiled_for(chip):
        reasons = dispatch.refusals(TABLES[op], call)
    assert sentence in reasons["pallas_tpu"]
    assert reasons[FALLBACK[op]] is None
    said = refused(op, chip, arguments, **options)
    assert said.startswith(f"{op} cannot serve ")
    assert said.endswith(f": pallas_tpu: {reasons['pallas_tpu']}.")


@both_ops
def test_the_list_of_implementations_follows_what_a_program_is_meant_for(op):
    with common.compiled_for("v5e"):
        assert ops.implementations(op)["pallas_tpu"] is None
    assert ops.implementations(op)["pallas_tpu"] == "it runs on a TPU, not on 'cpu'"
    with common.interpreted(lanes=8):
        assert ops.implementations(op)["pallas_tpu"] is None


def test_a_float64_gate_makes_a_call_wide(chosen):
    arguments = shapes("mlstm", "float32")
    arguments["i"] = jax.ShapeDtypeStruct(arguments["i"].shape, jnp.float64)
    name, call = chosen("mlstm", arguments, "v5e")
    assert (name, call.dtype) == ("chunkwise", jnp.dtype("float64"))


def test_what_is_judged_is_the_dtype_that_is_computed_with(chosen):
    """Heads that fit a v4 in bfloat16 do not in float32, which a float32 query makes of them."""
    arguments = shapes("mlstm", "bfloat16", K=640)
    assert chosen("mlstm", arguments, "v4")[0] == "pallas_tpu"
    q = jax.ShapeDtypeStruct(arguments["q"].shape, "float32")
    assert chosen("mlstm", {**arguments, "q": q}, "v4")[0] == "chunkwise"
