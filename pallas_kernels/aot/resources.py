"""Compiling for GPUs that are not here, and reading what every Triton kernel takes of one.

No GPU and no CUDA toolkit are needed: Triton's wheel has the assembler, the wheels of JAX's CUDA
plugin have XLA's compiler. On the machine XLA takes the assembler that it finds there, so registers
may differ by a few.
"""

import functools
import importlib
import pathlib
import re
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import tpu_offline
from pallas_kernels import common, gpu
from xlstm_jax.plan import gpus

DEVICES = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
DEVICES |= {"sm_86": "A10", "sm_89": "L4", "sm_120": "RTX 5090"}
"""The device that stands for a chip; a key of `gpus.DEVICES`."""

MATRIX_UNITS = ("tcgen05.mma", "wgmma", "mma.sync")
ELEMENTS = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint32": "u32"}
ELEMENTS |= {"int8": "i8", "uint8": "u8", "bool": "i1"}


class Resources(NamedTuple):
    """One kernel as the assembler has laid it out."""

    name: str  # of the call
    registers: int  # of a thread; 255 at most
    spills: int  # bytes of a thread's registers that lie in memory
    shared_bytes: int  # of a program
    tensor_columns: int  # of a Blackwell's tensor memory, which has 512
    assembly: float  # version of the language that Triton wrote for the assembler
    matrix_unit: str  # the instruction that multiplies matrices; "" if none does
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    constants: dict[str, Any]


class Launch(NamedTuple):
    """A call of a kernel: all that its compilation depends on."""

    kernel: Any  # of `triton.jit`
    name: str
    grid: tuple[int, ...]
    parameters: tuple[tuple[str, str], ...]  # name and type
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


def resources(chip: str, fn: Callable[..., Any], *args) -> list[Resources]:
    """Those of every Triton kernel that `fn` launches on `chip`, each once, in order.

    Args:
        chip: a key of `gpu.CHIPS`.
        fn: a pure function; a gradient shows what it launches, its forward pass included.
        args: trees of `jax.ShapeDtypeStruct`.
    """
    capability = gpu.CHIPS[chip].capability
    return [_assembled(launch, capability) for launch in launches_for(chip, fn, *args)]


def launches_for(chip: str, fn: Callable[..., Any], *args) -> list[Launch]:
    """As `launches`, on a chip that need not be here."""
    with common.compiled_for(chip):
        return launches(fn, *args)


def launches(fn: Callable[..., Any], *args) -> list[Launch]:
    """Every Triton kernel that `fn` calls, each once, in order."""
    return list(dict.fromkeys(map(_launch, _calls(jax.make_jaxpr(fn)(*args).jaxpr))))


def _calls(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """The calls of Triton kernels, in functions within functions too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "triton_kernel_call":
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, core.Jaxpr):
                yield from _calls(inner)


def _launch(equation: core.JaxprEqn) -> Launch:
    """From a call's parameters, whose names changed between jax-triton 0.3 and 0.4."""
    params = dict(equation.params)
    arrays: list[Any] = [variable.aval for variable in equation.invars]
    results: list[Any] = [variable.aval for variable in equation.outvars]
    if "metaparams" in params:
        constants, options = params["metaparams"], params["backend_options"]
        # Where a result stands, or a number for one that takes the place of an array.
        arrays = params["in_tree"].unflatten(arrays)
        arrays = [results[x.ordinal] if hasattr(x, "ordinal") else x for x in arrays]
    else:
        names = {parameter.name for parameter in params["fn"].params}
        constants = {key: value for key, value in params.items() if key in names}
        options = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")
        options = {key: params[key] for key in options}
        arrays = arrays + results
    names = [name for name in params["fn"].arg_names if name not in constants]
    types = [f"*{ELEMENTS[str(x.dtype)]}" if hasattr(x, "dtype") else "i32" for x in arrays]
    return Launch(
        params["fn"],
        params["name"],
        params["grid"],
        tuple(zip(names, types, strict=True)),
        tuple(sorted(constants.items())),
        tuple(sorted(options.items())),
    )


@functools.cache
def _assembled(launch: Launch, capability: int) -> Resources:
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    constants = dict(launch.constants)
    source = triton.compiler.ASTSource(
        launch.kernel,
        signature=dict(launch.parameters) | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        # jax-triton says the same of all arrays: XLA's begin at multiples of 16 bytes.
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, (_, kind) in enumerate(launch.parameters)
            if kind.startswith("*")
        },
    )
    with triton.knobs.cache.scope():
        # jax-triton takes the folder away; without one nothing is compiled.
        triton.knobs.cache.dir = triton.knobs.cache.get_triton_dir("cache")
        kernel = triton.compile(source, target=target, options=dict(launch.options))
    used = _usage(triton.knobs.nvidia.cuobjdump.path, kernel.asm["cubin"])
    version = re.search(r"\.version (\d+\.\d+)", kernel.asm["ptx"])
    assert version is not None
    units = (unit for unit in MATRIX_UNITS if unit in kernel.asm["ptx"])
    return Resources(
        name=launch.name,
        registers=used["REG"],
        # A frame on the stack is what ptxas makes for spills; nothing else of ours needs one.
        spills=used["STACK"] + used["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0),
        assembly=float(version[1]),
        matrix_unit=next(units, ""),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        grid=launch.grid,
        constants=constants,
    )


def _usage(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """What the assembler has noted of the one function in `cubin`."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [cuobjdump, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


@functools.cache
def devices(chip: str, count: int = 1) -> tuple:
    """That many devices of one machine."""
    found = topologies.get_topology_desc(
        platform="cuda",
        target_config=gpus.target_config(DEVICES[chip]),
        topology=f"1x1x{count}",
    )
    return tuple(found.devices)


def compile_for(
    chip: str, fn, *args, mesh: Mesh | None = None, shardings=None, donate: int | None = None
) -> jax.stages.Compiled:
    """`fn` compiled for arguments of these shapes, for one GPU or for a mesh of several.

    Triton compiles its kernels to assembly; what the assembler makes of it is in `resources`.

    Args:
        chip: a key of `gpu.CHIPS`.
        fn: a pure function.
        args: trees of `jax.ShapeDtypeStruct`.
        mesh: of `devices`, as `tpu_offline.mesh_of` lays them out; None: one of them.
        shardings: for a mesh, a sharding for every array, in a tree like `args`.
        donate: the number of an argument whose memory the results may take.
    """
    if mesh is None:
        mesh = tpu_offline.mesh_of(devices(chip))
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), args)
    return tpu_offline.compile_for(chip, fn, *args, mesh=mesh, shardings=shardings, donate=donate)


def kernels(compiled: jax.stages.Compiled) -> set[str]:
    """The names of the Triton kernels in a program."""
    text = str(compiled.as_text())
    configs = re.findall(r'"triton_kernel_call\w*",.*?backend_config=(.*)', text)
    return {_name(config) for config in configs}


def _name(config: str) -> str:
    """What a call was named: the last field of the compressed message that XLA hands over."""
    opaque = re.search(r'(opaque = )?"((?:[^"\\]|\\.)*)"', config)
    assert opaque is not None
    escaped = opaque[2].encode("latin-1")
    if opaque[1]:  # jax-triton 0.4: an attribute of MLIR, whose escapes are hexadecimal
        found = re.sub(rb"\\(\\|[0-9A-F]{2})", _hexadecimal, escaped)
    else:
        found = escaped.decode("unicode_escape").encode("latin-1")
    name = re.search(rb'".(\w+)\Z', zlib.decompress(found), re.DOTALL)
    assert name is not None
    return name[1].decode()


def _hexadecimal(escape: re.Match[bytes]) -> bytes:
    return escape[1] if escape[1] == b"\\" else bytes.fromhex(escape[1].decode())
