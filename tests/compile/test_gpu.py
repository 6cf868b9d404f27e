"""Every Triton kernel, forward and gradient, compiles for every chip without register spills."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import decode_step, gpu_resources, kernel_jax
from experiments.benchmarks.gpu_resources import WIDTHS
from experiments.benchmarks.kernel_cases import PARTS, Case
from pallas_kernels import common, gpu
from pallas_kernels.aot import compiler, resources
from tests.compile import calls
from xlstm_jax import ops
from xlstm_jax.plan.hlo import Program, called_computations

KERNELS = {
    "mlstm": {
        "forward": calls.TRITON_FORWARD,
        "gradient": calls.TRITON_GRADIENT,
        "decode": {"mlstm_decode"},
    },
    "slstm": {
        "forward": {"slstm_forward"},
        "gradient": {"slstm_forward", "slstm_backward"},
        "decode": {"slstm_decode"},
    },
}
GATES = {f"mlstm_{x}" for x in ("chunk_maps", "gates", "gates_backward", "gate_grads")}
TRITON = dict(implementation="triton")
CALLS = {
    "mlstm": calls.mlstm(512, 256, 512, **TRITON),
    "mlstm, resets and masks": calls.mlstm(512, 256, 512, flags=True, **TRITON),
    "mlstm, odd sizes, float32": calls.mlstm(300, 40, 96, jnp.float32, **TRITON),
    "mlstm, sigmoid, no normalizer": calls.mlstm(
        256, 128, 256, input_gate="sigmoid", normalize=False, **TRITON
    ),
    "slstm": calls.slstm(256, 256, **TRITON),
    "slstm, resets and masks": calls.slstm(100, 64, flags=True, **TRITON),
    "slstm, float32": calls.slstm(64, 128, jnp.float32, **TRITON),
}
STEPS = {
    "mlstm": calls.mlstm(1, 256, 512, **TRITON),
    "mlstm, odd widths": calls.mlstm(1, 40, 96, jnp.float32, **TRITON),
    "mlstm, resets and masks": calls.mlstm(1, 256, 512, flags=True, **TRITON),
    "slstm": calls.slstm(1, 256, **TRITON),
    "slstm, resets and masks": calls.slstm(1, 64, jnp.float32, flags=True, **TRITON),
}


NEWEST_PTX = 8.8
"""Newest PTX version that ptxas of CUDA 12.9, the oldest that comes with JAX, can read. XLA does
not use the newer ptxas of Triton's wheel."""


def test_kernels_compile_in_this_environment():
    with common.compiled_for("sm_90"):
        assert gpu.refusal() is None


@pytest.mark.parametrize(
    "op,dtype,K,V",
    [
        (op, dtype, K, V)
        for op in KERNELS
        for dtype, widths in WIDTHS[op].items()
        for K, V in widths
    ],
)
def test_no_kernel_spills_registers_or_exceeds_shared_memory(gpu_chip, op, dtype, K, V):
    """Forward, gradient and decoding at the default tile, with the chip's matrix instruction."""
    unit = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(gpu_chip, "mma.sync")
    if op == "slstm":
        unit = "mma.sync"  # the only instruction for M = 16, the sequences of one program
    for part in PARTS:
        T = 1 if part == "decode" else 1024
        case = Case(op=op, part=part, B=16, T=T, H=4, K=K, V=V, dtype=dtype)
        kernels = gpu_resources.kernel_resources(gpu_chip, case)
        assert {kernel.name for kernel in kernels} == KERNELS[op][part]
        for kernel in kernels:
            assert resources.exceeded_limits(gpu_chip, kernel) == []
            assert kernel.ptx_version <= NEWEST_PTX
            if part == "gradient" and (K, V) == WIDTHS[op]["bfloat16"][1] and dtype == "bfloat16":
                assert kernel.matrix_unit == ("" if kernel.name in GATES else unit)


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("part", PARTS)
def test_calls_of_another_length_and_batch_use_the_same_compiled_kernels(op, part):
    """Lengths and batches are arguments at run time: no kernel is compiled anew for them."""
    T, K, V = 1 if part == "decode" else 1024, 128, 128 if op == "slstm" else 256
    first, other = (
        _launches(Case(op=op, part=part, B=B, T=T, H=4, K=K, V=V))
        for B, T in ((2, T), (6, 2 * T if T > 1 else T))
    )
    assert first == other
    assert {launch.name for launch in first} == KERNELS[op][part]


def _launches(case: Case) -> list[resources.Launch]:
    with common.compiled_for("sm_90"):
        shapes = jax.eval_shape(lambda: kernel_jax.inputs(case, "triton"))
    function = kernel_jax.timed_function(case, "triton")
    launches = resources.launches_for("sm_90", function, *shapes)
    return [launch._replace(grid=()) for launch in launches]


@pytest.mark.parametrize("part,most", [("forward", 2), ("gradient", 3)])
def test_xla_computes_activations_of_gates_only(part, most):
    """All other work on gates is in kernels, and no array of zeros stands for the initial state."""
    B, T, H, K, V = 2, 1024, 4, 128, 256
    qkv = (calls.shape(B, T, H, size, dtype=jnp.bfloat16) for size in (K, K, V))
    gates = calls.shape(B, T, H)

    def forward(*args):
        return ops.mlstm(*args, **TRITON)[0]

    def gradient(dh, *args):
        return jax.vjp(forward, *args)[1](dh)

    args = (*qkv, gates, gates)
    if part == "gradient":
        args = (calls.shape(B, T, H, V, dtype=jnp.bfloat16), *args)
    compiled = compiler.compile_for("sm_90", forward if part == "forward" else gradient, *args)
    text = compiled.as_text()
    assert compiler.kernels(compiled) == KERNELS["mlstm"][part]
    entry = text[text.index("\nENTRY") :]
    launches = re.findall(r"= \S+ (?:fusion|copy|convert|reduce|while|sort|scatter)\(", entry)
    assert len(launches) <= most, launches


@pytest.mark.parametrize("name", [name for name in CALLS if name not in KERNELS])
def test_gradient_compiles_with_every_option(name):
    _assert_gradient_compiles("sm_90", name)


@pytest.mark.parametrize("op", KERNELS)
def test_gradient_compiles(gpu_chip, op):
    _assert_gradient_compiles(gpu_chip, op)


def _assert_gradient_compiles(chip, name):
    call, args = CALLS[name]
    compiled = compiler.compile_for(chip, calls.gradient(call), *args)
    # Without an exponential gate, the stabilizer is 0 and chunks have no map of it.
    unused = {"mlstm_chunk_maps"} if "sigmoid" in name else set()
    assert compiler.kernels(compiled) == KERNELS[name[:5]]["gradient"] - unused


@pytest.mark.parametrize("op", KERNELS)
def test_decoding_step_copies_a_donated_state_at_most_once(gpu_chip, op):
    _assert_state_is_copied_at_most_once(gpu_chip, op)


@pytest.mark.parametrize("name", [name for name in STEPS if name not in KERNELS])
def test_decoding_step_copies_a_donated_state_at_most_once_with_every_option(name):
    _assert_state_is_copied_at_most_once("sm_90", name)


def _assert_state_is_copied_at_most_once(chip, name):
    """From the buffer that the kernel writes to the donated one; without donation, never."""
    call, args = STEPS[name]
    state = 5 if name.startswith("mlstm") else 3
    size = sum(leaf.size * 4 for leaf in args[state])
    largest = max(args[state], key=lambda leaf: leaf.size)
    sizes = ",".join(map(str, largest.shape))
    for donate, copies in ((state, 4 if name.startswith("slstm") else 1), (None, 0)):
        compiled = compiler.compile_for(chip, call, *args, donate=donate)
        assert compiler.kernels(compiled) == KERNELS[name[:5]]["decode"]
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= (0 if donate is None else largest.size * 4)
        assert len(re.findall(rf"= f32\[{sizes}\]\S* copy\(", compiled.as_text())) <= copies
        inputs = sum(x.size * x.dtype.itemsize for x in args[:state])
        assert memory.temp_size_in_bytes < 2 * (inputs + (0 if donate is None else size))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("loop", ["scan", "unrolled"])
def test_step_through_stacked_layers_returns_new_states_and_keeps_old_ones(op, loop):
    """XLA of jax 0.11 fuses a kernel with the slices of stacked arrays. It passes an aliased
    operand a slice of the old states, which is overwritten, and returns uninitialized memory."""
    sizes = {"mlstm": (3, 1, 8, 256, 512), "slstm": (3, 1, 4, 256, 256)}[op]
    compiled = decode_step.compile_step("sm_90", op, loop, sizes)
    program = Program(str(compiled.as_text()))
    kernel_calls = decode_step.kernel_calls(program)
    assert len(kernel_calls) == (1 if loop == "scan" else 3)  # none is computed twice
    assert not [call for call in kernel_calls if "output_to_operand_aliasing" in call.attributes]
    sources = [_kernels_behind(program, *result) for result in _results(program, loop)]
    # h and the state; XLA computes m of the mLSTM. Of unrolled layers, h is that of the last one.
    results = [calls for calls in sources if len(calls) == len(kernel_calls)]
    assert len(results) == {"mlstm": 2, "slstm": 4}[op] + (loop == "scan")


def _results(program: Program, loop: str) -> list[tuple[str, str]]:
    """Computation and name of every result of the program, or of the body of its loop."""
    computation = program.entry
    if loop == "scan":
        (computation,) = re.findall(
            r"body=%([\w.\-]+)", " ".join(x.attributes for x in program.computations[computation])
        )
    return [(computation, name) for name in program.computations[computation][-1].operands]


def _kernels_behind(program: Program, computation: str, name: str) -> set[tuple[str, str]]:
    """The last kernel calls, by computation and name, from which a value is computed."""
    by_name = {x.name: x for x in program.computations[computation]}
    value = by_name[name]
    if decode_step.KERNEL in value.attributes:
        return {(computation, name)}
    index = re.search(r"index=(\d+)", value.attributes)
    if index and by_name[value.operands[0]].opcode == "fusion":  # one of several results
        value = by_name[value.operands[0]]
        (fused,) = called_computations(value)
        root = program.computations[fused][-1]
        result = root.operands[int(index[1])] if root.opcode == "tuple" else root.name
        inside = _kernels_behind(program, fused, result)
        if inside:
            return inside
    return set().union(*(_kernels_behind(program, computation, x) for x in value.operands))


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_on_a_mesh_need_no_collectives(op):
    """Except for the gradient of the recurrent weights, which is summed over the batch."""
    mesh = compiler.make_mesh(compiler.devices("sm_90", 4), tensor=2)
    call, args = CALLS[op]
    kwargs = dict(mesh=mesh, shardings=calls.shardings(mesh, op, args))
    forward = compiler.compile_for("sm_90", call, *args, **kwargs)
    assert compiler.kernels(forward) == KERNELS[op]["forward"]
    assert not re.findall(calls.COLLECTIVES, forward.as_text())
    backward = compiler.compile_for("sm_90", calls.pullback(call), *args, **kwargs).as_text()
    collectives = set(re.findall(calls.COLLECTIVES, backward))
    assert collectives <= ({"all-reduce"} if op == "slstm" else set())


@pytest.mark.parametrize("op", KERNELS)
def test_vmap_of_the_gradient_compiles(op):
    call, args = CALLS[op]
    mapped = jax.tree.map(lambda x: calls.shape(2, *x.shape, dtype=x.dtype), args)
    compiled = compiler.compile_for("sm_90", jax.vmap(calls.gradient(call)), *mapped)
    assert compiler.kernels(compiled) == KERNELS[op]["gradient"]


@pytest.mark.parametrize("op", KERNELS)
def test_kernels_are_used_by_default_on_a_gpu(op):
    sizes = {"mlstm": (512, 256, 512), "slstm": (256, 256)}[op]
    call, args = getattr(calls, op)(*sizes, implementation="auto")
    compiled = compiler.compile_for("sm_90", call, *args)
    assert compiler.kernels(compiled) == KERNELS[op]["forward"]


@pytest.mark.parametrize("op", KERNELS)
def test_float16_is_not_supported(op):
    sizes = {"mlstm": (512, 256, 512), "slstm": (256, 256)}[op]
    call, args = getattr(calls, op)(*sizes, jnp.float16, **TRITON)
    with pytest.raises(NotImplementedError, match="float16 overflows"):
        resources.launches_for("sm_90", call, *args)


def test_error_for_an_unaligned_chunk_size_names_an_aligned_one():
    call, args = calls.mlstm(512, 256, 512, chunk_size=100, **TRITON)
    with pytest.raises(NotImplementedError, match="chunk_size=100 is not a multiple of 64.*128"):
        resources.launches_for("sm_90", call, *args)


@pytest.mark.parametrize("op", KERNELS)
def test_triton_is_not_supported_on_a_tpu(op):
    with common.compiled_for("v5e"):
        assert "runs on a GPU" in str(ops.implementations(op)["triton"])
