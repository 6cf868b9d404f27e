"""What reading of kernels' resources does besides compiling, which `tests/compile` has."""

import re
import zlib

import jax
import pytest

from experiments.benchmarks import gpu_resources
from experiments.benchmarks.gpu_resources import Arguments
from pallas_kernels.aot import compiler, resources, topologies
from pallas_kernels.aot.resources import Resources
from pallas_kernels.hardware import GPUS

MESSAGE = zlib.compress(b'\n\x07 "kernel"\x00\x01"\x0dmlstm_forward')
KERNEL = Resources("mlstm_h", 128, 0, 65536, 256, 8.8, "wgmma", 8, 2, (64, 1), {"L": 128})


def _octal(data: bytes) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in data) + '"'


def _hexadecimal(data: bytes) -> str:
    plain = lambda byte: byte in range(32, 127) and byte not in b'"\\'  # noqa: E731
    return "".join(chr(byte) if plain(byte) else f"\\{byte:02X}" for byte in data)


@pytest.mark.parametrize(
    "target,config",
    [
        ("triton_kernel_call", _octal(MESSAGE)),
        ("triton_kernel_call_ffi", f'{{opaque = "{_hexadecimal(MESSAGE)}"}}'),
    ],
)
def test_the_name_of_a_call_is_read_off_the_program(target, config):
    """As jax-triton 0.3 and 0.4 write it down."""
    line = f'%x = f32[] custom-call(%y), custom_call_target="{target}", metadata={{}}'
    text = f"HloModule\n  {line}, backend_config={config}\n"
    assert compiler.kernel_names(text) == {"mlstm_forward"}


def test_kernels_are_found_in_functions_within_functions():
    primitive = jax.extend.core.Primitive("triton_kernel_call")
    primitive.def_abstract_eval(lambda x: x)
    inner = jax.jit(lambda x: jax.lax.scan(lambda c, _: (primitive.bind(c), None), x, length=2)[0])

    def fn(x):
        return jax.lax.cond(x[0] > 0, inner, lambda x: x, primitive.bind(x))

    jaxpr = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3,), "float32")).jaxpr
    assert len(list(resources._calls(jaxpr))) == 2


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_described_to_its_compiler(name):
    gpu, text = GPUS[name], topologies.target_config(name)
    assert f"shared_memory_per_block_optin: {gpu.shared_bytes} " in text
    assert f"memory_bandwidth: {gpu.hbm_bandwidth:.0f} " in text
    assert re.search(rf"{{ major: {gpu.capability // 10} minor: {gpu.capability % 10} }}", text)
    assert text.count("{") == text.count("}")


def test_a_kernel_that_fits_has_nothing_against_it():
    assert resources.exceeded_limits("sm_90", KERNEL) == []


@pytest.mark.parametrize(
    "change,words",
    [
        ({"spills": 8}, "8 bytes spilled, at most 0"),
        ({"registers": 255}, "255 registers, at most 254"),
        ({"shared_bytes": 170 << 10}, "174080 bytes of shared memory, at most 166912"),
        ({"tensor_columns": 640}, "640 columns of tensor memory, at most 512"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    (found,) = resources.exceeded_limits("sm_80", KERNEL._replace(**change))
    assert found == f"mlstm_h on sm_80: {words}"


def test_every_width_is_looked_at_in_every_part():
    found = list(gpu_resources.cases(Arguments(ops=("mlstm",), dtypes=("bfloat16",))))
    assert len(found) == 4 * 3
    assert {case.T for case in found if case.part == "decode"} == {1}
    narrow = list(gpu_resources.cases(Arguments(widths=(64,))))
    assert {(case.op, case.K) for case in narrow} == {("mlstm", 64), ("slstm", 64)}


def test_a_table_has_a_column_per_chip_and_marks_what_does_not_fit():
    row = {"K": 64, "V": 128, "dtype": "bfloat16", "complaints": [], **KERNEL._asdict()}
    rows = [
        {**row, "chip": "sm_80", "spills": 4, "complaints": ["spills"]},
        {**row, "chip": "sm_90"},
    ]
    assert gpu_resources.table(rows).splitlines() == [
        "| kernel | K, V, dtype | sm_80 | sm_90 |",
        "|---|---|---|---|",
        "| `mlstm_h` | 64, 128, bfloat16 | 128 r, 4 B, 64 KiB, 8 w, 2 s ! "
        "| 128 r, 0 B, 64 KiB, 8 w, 2 s |",
    ]
