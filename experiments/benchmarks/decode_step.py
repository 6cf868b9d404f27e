"""Copies of states in compiled decode steps: one token through several layers on a GPU.

States and parameters are stacked, as in a model; diagonal projections stand in for its matrices, so
that only states and kernels differ between versions. No GPU is needed, and nothing is timed.

    .venv-compile/bin/python experiments/benchmarks/decode_step.py --out RESULT.json
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure
from pallas_kernels.aot import compiler
from xlstm_jax import cells, ops
from xlstm_jax.plan.hlo import Instruction, Program, called_computations
from xlstm_jax.plan.traffic import traffic_by_instruction

SIZES = {
    "mlstm": {"scan": (32, 1, 8, 256, 512), "unrolled": (4, 1, 8, 256, 512)},
    "slstm": {"scan": (12, 1, 4, 256, 256), "unrolled": (4, 1, 4, 256, 256)},
}
"""Layers, B, H, K and V, by op and loop over the layers."""

KERNEL = 'custom_call_target="triton_kernel_call'
"""In the attributes of a call of a Triton kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """Options of the report."""

    chip: str = "sm_90"  # key of `hardware.ARCHITECTURES`
    label: str = ""  # of the result, such as the version of the kernels


def compile_step(chip: str, op: str, loop: str, sizes: tuple[int, ...]) -> jax.stages.Compiled:
    """The decode step of all layers, which returns h and the new states, compiled for `chip`."""
    layers, B, H, K, V = sizes
    shape = lambda *axes: jax.ShapeDtypeStruct((layers, *axes), jnp.float32)  # noqa: E731
    if op == "mlstm":
        state = jax.eval_shape(lambda: cells.mlstm_init(B, H, K, V))
        q, v = shape(1, 1, H, K), shape(1, 1, H, V)
        params = {"q": q, "k": q, "v": v, "i": shape(1, 1, H)}
    else:
        state = jax.eval_shape(lambda: cells.slstm_init(B, H, V))
        params = {"x": shape(1, 1, 4, H, V), "r": shape(H, V, 4, V), "b": shape(H, 4, V)}
    states = jax.tree.map(lambda leaf: shape(*leaf.shape), state)
    h = jax.ShapeDtypeStruct((B, 1, H, V), jnp.bfloat16)
    step = {"mlstm": _mlstm, "slstm": _slstm}[op]

    def scan(states, params, h):
        return jax.lax.scan(step, h, (states, params))

    def unrolled(states, params, h):
        new = []
        for layer in range(layers):
            h, state = step(h, jax.tree.map(lambda leaf, n=layer: leaf[n], (states, params)))
            new.append(state)
        return h, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)

    return compiler.compile_for(chip, {"scan": scan, "unrolled": unrolled}[loop], states, params, h)


def _mlstm(h, inputs):
    state, params = inputs
    q, k, v, i = (params[name].astype(h.dtype) for name in "qkvi")
    gate = jnp.broadcast_to(i, h.shape[:3])
    K = q.shape[-1]
    return ops.mlstm(
        h[..., :K] * q, h[..., :K] * k, h * v, gate, gate, state, implementation="triton"
    )


def _slstm(h, inputs):
    state, params = inputs
    x = h[:, :, None] * params["x"].astype(h.dtype)
    return ops.slstm(x, params["r"], params["b"], state, implementation="triton")


def kernel_calls(program: Program) -> list[Instruction]:
    """Calls of Triton kernels, also those in fusions."""
    return [x for code in program.computations.values() for x in code if KERNEL in x.attributes]


def state_copies(program: Program, sizes: tuple[int, ...], op: str) -> tuple[int, int]:
    """How often others than the kernels write states of one or all layers; bytes read and written.

    m of the mLSTM, which is no result of the kernel, is left out.
    """
    layers, B, H, K, V = sizes
    leaves = ((B, H, K, V), (B, H, K)) if op == "mlstm" else ((B, H, V),)
    written = {stack + leaf for leaf in leaves for stack in ((), (1,), (layers,))}
    number = total = 0
    for instruction, count, size in traffic_by_instruction(program):
        fused = [program.computations[name] for name in called_computations(instruction)]
        has_kernel = any(KERNEL in x.attributes for x in (instruction, *sum(fused, [])))
        is_state = any(dtype == "f32" and axes in written for dtype, axes in instruction.shapes)
        if size and is_state and not has_kernel:
            number, total = number + count, total + count * size
    return number, total


def record(chip: str, op: str, loop: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Figures of one compiled decode step."""
    compiled = compile_step(chip, op, loop, sizes)
    program, memory = Program(str(compiled.as_text())), compiled.memory_analysis()
    assert memory is not None
    calls = kernel_calls(program)
    unfused = [instruction for instruction, *_ in traffic_by_instruction(program)]
    number, size = state_copies(program, sizes, op)
    return {
        "op": op,
        "loop": loop,
        "sizes": sizes,
        "kernel_calls": len(calls),
        "fused_kernel_calls": sum(call not in unfused for call in calls),
        "aliased_kernel_calls": sum("output_to_operand_aliasing" in x.attributes for x in calls),
        "state_copies": number,
        "state_copies_bytes": size,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def main(args: Arguments) -> int:
    """Compiles every decode step, prints a table and writes the result."""
    steps = [(op, loop) for op, loops in SIZES.items() for loop in loops]
    records = [record(args.chip, op, loop, SIZES[op][loop]) for op, loop in steps]
    packages = (*measure.PACKAGES, "jax-triton", "triton")
    info = {**measure.run_info("decode_step", packages), "command": sys.argv}
    measure.write(args.out, {**info, "label": args.label, "chip": args.chip, "records": records})
    print(measure.table(list(records[0]), [[str(x) for x in r.values()] for r in records]))
    return 0


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
