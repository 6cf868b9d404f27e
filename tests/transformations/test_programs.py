"""Programs of `jax.export`: for every platform, with a symbolic batch and length, serialized."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from pallas_kernels import common
from tests.modules import models
from tests.transformations.cases import (
    BY_NAME,
    B,
    Case,
    T,
    assert_close,
    each_case,
    outputs,
)
from xlstm_jax import ops
from xlstm_jax.errors import UnsupportedError
from xlstm_jax.modules import LM, LMConfig

PLATFORMS = ("cpu", "cuda", "tpu")
NEEDS_LENGTH = ("mlstm-chunkwise", "mlstm-parallel")


def on_cpu(case: Case) -> bool:
    return not case.is_kernel


def takes_any_length(case: Case) -> bool:
    return on_cpu(case) and not case.is_step and case.name not in NEEDS_LENGTH


@functools.cache
def exported(name: str, sizes: str = "b") -> export.Exported:
    """The program of a case in float32 for all platforms; `sizes` are symbolic, "b" or "b, t"."""
    case = BY_NAME[name]
    b, *t = export.symbolic_shape(sizes)
    arguments = case.arguments(dtype="float32")

    def spec(x, is_timed: bool):
        shape = list(x.shape)
        shape[_batch_axis(x)] = b
        if is_timed and t:
            shape[1] = t[0]
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    for argument in case.batched:
        is_timed = not case.is_step and argument != "state"
        arguments[argument] = jax.tree.map(
            functools.partial(spec, is_timed=is_timed), arguments[argument]
        )
    return export.export(jax.jit(case.run), platforms=PLATFORMS)(arguments)


def _batch_axis(x) -> int:
    """The leaves of a model's state are `layers B ...`, with one layer; other arrays `B ...`."""
    return 0 if x.shape[0] == B else 1


def larger(case: Case, *, longer: bool):
    """Float32 arguments with twice the batch, or with the batch and twice the length."""
    first, second = (case.arguments(seed, "float32") for seed in (0, 1))
    for name in case.batched:
        if longer and name != "state":
            first[name] = jnp.concatenate([first[name], second[name]], axis=1)
        elif not longer:
            first[name] = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b], axis=_batch_axis(a)), first[name], second[name]
            )
    return first


@each_case(on_cpu)
def test_program_with_a_symbolic_batch_equals_the_function(case):
    with jax.enable_x64(False):
        arguments = larger(case, longer=False)
        actual = exported(case.name).call(arguments)
        assert_close(actual, outputs(case.name)(arguments), 1e-5)


@each_case(takes_any_length, slow=("",))
def test_program_with_a_symbolic_length_equals_the_function(case):
    with jax.enable_x64(False):
        arguments = larger(case, longer=True)
        actual = exported(case.name, "b, t").call(arguments)
        assert_close(actual, outputs(case.name)(arguments), 1e-5)


@each_case(on_cpu)
def test_serialized_program_is_the_same(case):
    pytest.importorskip("flatbuffers")
    with jax.enable_x64(False):
        program = exported(case.name)
        restored = export.deserialize(program.serialize())
    assert restored.mlir_module() == program.mlir_module()
    assert str(restored.in_avals) == str(program.in_avals)  # each has its own scope of symbols


@each_case(lambda case: case.name in NEEDS_LENGTH, slow=())
def test_implementation_that_needs_a_length_refuses_a_symbolic_one(case):
    match = f"{case.implementation}: T=t is symbolic; export one program per sequence length"
    with pytest.raises(UnsupportedError, match=match):
        exported(case.name, "b, t")


@each_case(lambda case: case.is_kernel, slow=())
def test_kernel_refuses_a_symbolic_batch(case):
    match = f"{case.implementation}: B=b is symbolic; export one program per batch size"
    with pytest.raises(UnsupportedError, match=match):
        exported(case.name)


@each_case(lambda case: case.implementation == "pallas_tpu", slow=())
def test_kernel_is_exported_for_tpus(case):
    op = getattr(ops, case.name.split("-")[0])
    fn = functools.partial(op, implementation=case.implementation)
    arguments = case.arguments(dtype="float32")
    with common.compiled_for("v5e"), jax.sharding.use_abstract_mesh(one_chip("TPU v5e")):
        program = export.export(jax.jit(fn), platforms=["tpu"])(**arguments)
    assert program.platforms == ("tpu",)


def one_chip(kind: str) -> jax.sharding.AbstractMesh:
    """From jax 0.11 on, kernels are lowered without a chip only if a mesh names it."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.AbstractMesh((1,), ("chips",), abstract_device=device)


def test_auto_is_the_recurrence_for_a_symbolic_length():
    """A model of any length can be exported, also one that is scanned and rematerialized."""
    model = LM(LMConfig(vocab_size=5, dim=8, pattern="mmmsmmm", remat="full"))
    tokens = jax.ShapeDtypeStruct(export.symbolic_shape("b, t"), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, T), jnp.int32))
    program = export.export(jax.jit(model.apply))(variables, tokens)
    assert program.out_avals[0].shape[:2] == tokens.shape


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 4])
def test_a_model_with_caches_is_exported_with_its_state(length):
    """The program is serialized with the types of states; lengths of caches are integers."""
    model, variables = models.model_and_variables(models.config(models.MIXED_BASELINES))
    arguments = variables, models.tokens(0, 3, length), model.init_state(3)
    (b,) = export.symbolic_shape("b")
    tokens = jax.ShapeDtypeStruct((b, length), jnp.int32)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(x), b, *x.shape[2:]), x.dtype), arguments[2]
    )
    program = export.export(jax.jit(model.apply))(variables, tokens, state)
    actual = export.deserialize(program.serialize()).call(*arguments)
    assert_close(actual, jax.jit(model.apply)(*arguments), 1e-5)


def test_chunks_of_logits_do_not_depend_on_a_symbolic_batch():
    """By default, the size of a chunk is chosen by the op."""
    case, (b,) = BY_NAME["cross_entropy"], export.symbolic_shape("b")
    arguments = case.arguments(dtype="float32")
    shapes = jax.eval_shape(lambda: arguments)
    for name in case.batched:
        shapes[name] = jax.ShapeDtypeStruct((b, *shapes[name].shape[1:]), shapes[name].dtype)
    actual = export.export(jax.jit(ops.cross_entropy))(**shapes).call(**arguments)
    assert_close(actual, jax.jit(ops.cross_entropy)(**arguments), 1e-5)
