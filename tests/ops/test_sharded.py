"""Kernels on a mesh: each device computes its shard, and results do not change."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import common
from tests import quick
from tests.ops.subjects import KERNELS, implementations
from tests.ops.tolerances import TABLE, assert_close, assert_gradients_close
from xlstm_jax import cells, ops
from xlstm_jax.sharding import make_mesh

pytestmark = pytest.mark.slow  # compiles many programs for eight devices

T, K, V = 9, 8, 8
MESHES = {
    "data, fsdp, tensor": dict(data=2, fsdp=2, tensor=2),
    "seq": dict(data=2, seq=2, tensor=2),
}
OPS = ("mlstm", "slstm")
PRIMITIVES = {"pallas_tpu": "pallas_call", "triton": "pure_callback"}
"""The primitive of an interpreted kernel in a jaxpr."""
IN_SPECS = {
    "mlstm": dict.fromkeys("qkvif", P("data", None, "tensor")),
    "slstm": {"x": P("data", None, None, "tensor"), "r": P("tensor"), "b": P("tensor")},
}


class Subject(NamedTuple):
    """An op, computed by the kernels of one backend."""

    op: str
    kernels: str

    @property
    def primitive(self) -> str:
        return PRIMITIVES[self.kernels]


def _subjects():
    """Every kernel of both ops; one that cannot run on this machine is skipped with the reason."""
    for op in OPS:
        for name, refusal in implementations(op).items():
            if name in KERNELS:
                marks = [] if refusal is None else pytest.mark.skip(reason=refusal)
                yield pytest.param(Subject(op, name), id=f"{op}-{name}", marks=marks)


every_kernel = pytest.mark.parametrize("subject", list(_subjects()))


class Call(NamedTuple):
    """Differentiable arguments of one call, flags, and cotangents of all results."""

    inputs: dict[str, Any]
    state: Any
    flags: dict[str, Any]
    cotangents: tuple[Any, Any]


def make_call(op: str, B: int = 4, H: int = 2) -> Call:
    rng = np.random.default_rng([B, H])
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    if op == "mlstm":
        inputs = {name: normal(B, T, H, K) for name in "qkv"}
        inputs |= {name: normal(B, T, H) for name in "if"}
        state = cells.MLSTMState(normal(B, H, K, V), normal(B, H, K), normal(B, H))
    else:
        inputs = {"x": normal(B, T, 4, H, K), "r": 0.2 * normal(H, K, 4, K), "b": normal(H, 4, K)}
        c, n, h, m = (normal(B, H, K) for _ in range(4))
        state = cells.SLSTMState(c, 1 + jnp.abs(n), h, m)
    cotangents = normal(B, T, H, V), jax.tree.map(lambda leaf: normal(*leaf.shape), state)
    flags = {"reset": rng.random((B, T)) < 0.2, "mask": rng.random((B, T)) < 0.8}
    return Call(inputs, state, jax.tree.map(jnp.asarray, flags), cotangents)


def run_kernels(subject: Subject, inputs, state, flags):
    call = functools.partial(getattr(ops, subject.op), implementation=subject.kernels)
    if subject.op == "mlstm":
        call = functools.partial(call, chunk_size=8)
    return call(**inputs, state=state, **flags)


def evaluate(compute, call: Call):
    """Results of `compute` and all gradients, by name."""
    run = lambda inputs, state: compute(inputs, state, call.flags)  # noqa: E731
    (h, state), pullback = jax.vjp(run, call.inputs, call.state)
    inputs, initial = pullback(call.cotangents)
    gradients = inputs | {f"state.{name}": leaf for name, leaf in initial._asdict().items()}
    return {"h": h, **state._asdict()}, gradients


@contextlib.contextmanager
def on(mesh):
    """Interpret kernels on all devices of `mesh`, or on a single device if it is None."""
    with common.interpreted(lanes=8), contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        yield


def run(compute, call: Call, mesh):
    with on(mesh):
        results = quick.jit(functools.partial(evaluate, compute))(call)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), results)


@functools.cache
def single_device(subject: Subject):
    """Results on a single device."""
    return run(functools.partial(run_kernels, subject), make_call(subject.op), None)


def assert_same_results(actual, expected):
    tol = TABLE["float32"]
    for name, value in expected[0].items():
        assert_close(actual[0][name], value, tol.h, name)
    assert_gradients_close(actual[1], expected[1], tol)


def named(name: str, jaxpr):
    """Equations of this name in a jaxpr, nested jaxprs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from named(name, inner)


def equations(name: str, compute, call: Call, mesh) -> list:
    """Equations of this name in the jaxpr of `evaluate`."""
    with on(mesh):
        program = jax.make_jaxpr(functools.partial(evaluate, compute))(call)
    return list(named(name, program.jaxpr))


def mesh_axes_of(spec: P) -> set[str]:
    """Mesh axes in a partition spec."""
    return {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}


@every_kernel
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_mesh_changes_neither_values_nor_gradients(mesh, subject):
    """Time is replicated if `seq` does not divide it, and gradients are not summed twice."""
    compute = functools.partial(run_kernels, subject)
    assert_same_results(
        run(compute, make_call(subject.op), make_mesh(**mesh)), single_device(subject)
    )


@pytest.mark.parametrize(
    "mesh",
    [dict(data=8), dict(data=2, tensor=4), dict(data=1, seq=2, tensor=4)],
    ids=["batch", "heads", "replicated"],
)
@every_kernel
def test_indivisible_axes_are_replicated(subject, mesh):
    compute = functools.partial(run_kernels, subject)
    assert_same_results(
        run(compute, make_call(subject.op), make_mesh(**mesh)), single_device(subject)
    )


@pytest.mark.parametrize(
    "B,H,axes",
    [
        (4, 2, {"data", "fsdp", "tensor"}),
        (3, 2, {"tensor"}),
        (4, 3, {"data", "fsdp"}),
        (3, 3, set()),
    ],
)
@every_kernel
def test_batch_and_heads_are_sharded(subject, B, H, axes):
    mesh = make_mesh(**MESHES["data, fsdp, tensor"])
    maps = equations(
        "shard_map", functools.partial(run_kernels, subject), make_call(subject.op, B, H), mesh
    )
    forward = maps[0].params["in_specs"]
    assert {axis for axis in set.union(*map(mesh_axes_of, forward)) if mesh.shape[axis] > 1} == axes
    assert len(maps) >= 2  # also in the backward pass


def in_callers_shard_map(subject: Subject, mesh, axis_names: set[str]):
    """The op within a `shard_map` of the caller over these mesh axes."""
    only = lambda spec: P(*(a if a in axis_names else None for a in spec))  # noqa: E731
    specs = {name: only(spec) for name, spec in IN_SPECS[subject.op].items()}
    state_spec, flag_spec = only(P("data", "tensor")), only(P("data"))
    out_specs = (only(P("data", None, "tensor")), state_spec)
    return jax.shard_map(
        functools.partial(run_kernels, subject),
        mesh=mesh,
        in_specs=(specs, state_spec, flag_spec),
        out_specs=out_specs,
        axis_names=axis_names,
        check_vma=False,
    )


@every_kernel
def test_op_within_a_full_shard_map_has_no_nested_shard_map(subject):
    mesh = make_mesh(data=4, tensor=2)
    compute = in_callers_shard_map(subject, mesh, set(mesh.axis_names))
    call = make_call(subject.op)
    assert_same_results(run(compute, call, mesh), single_device(subject))
    for eqn in equations("shard_map", compute, call, mesh):
        (inner,) = jaxprs_in_params(eqn.params)
        assert not list(named("shard_map", inner))


@every_kernel
def test_op_uses_the_mesh_axes_outside_of_the_callers_shard_map(subject):
    """The caller shards the batch over data; the op shards it over fsdp, and heads over tensor."""
    mesh = make_mesh(**MESHES["data, fsdp, tensor"])
    compute = in_callers_shard_map(subject, mesh, {"data"})
    assert_same_results(run(compute, make_call(subject.op), mesh), single_device(subject))


@every_kernel
@pytest.mark.parametrize("on_mesh", [False, True], ids=["one device", "mesh"])
def test_auto_does_not_select_interpreted_kernels(subject, on_mesh):
    compute = lambda inputs, state, flags: getattr(ops, subject.op)(**inputs, state=state, **flags)  # noqa: E731
    mesh = make_mesh(data=4, tensor=2) if on_mesh else None
    assert not equations(subject.primitive, compute, make_call(subject.op), mesh)
    assert equations(
        subject.primitive, functools.partial(run_kernels, subject), make_call(subject.op), mesh
    )


@every_kernel
def test_explicit_mesh_axes_are_sharded(subject):
    """Explicit axes are the default of `jax.make_mesh`."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    call = make_call(subject.op)
    with on(mesh):
        compute = quick.jit(lambda call: run_kernels(subject, call.inputs, call.state, call.flags))
        h, state = jax.tree.map(np.asarray, compute(call))
    expected, _ = single_device(subject)
    for name, value in {"h": h, **state._asdict()}.items():
        assert_close(value, expected[name], TABLE["float32"].h, name)
