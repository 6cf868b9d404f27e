"""Parsing and reporting of kernel resources; `tests/compile` covers the compilation."""

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
def test_kernel_names_are_parsed_from_the_program(target, config):
    """In the formats of jax-triton 0.3 and 0.4."""
    line = f'%x = f32[] custom-call(%y), custom_call_target="{target}", metadata={{}}'
    text = f"HloModule\n  {line}, backend_config={config}\n"
    assert compiler.kernel_names(text) == {"mlstm_forward"}


def test_kernel_calls_in_nested_functions_are_collected():
    primitive = jax.extend.core.Primitive("triton_kernel_call")
    primitive.def_abstract_eval(lambda x: x)
    inner = jax.jit(lambda x: jax.lax.scan(lambda c, _: (primitive.bind(c), None), x, length=2)[0])

    def fn(x):
        return jax.lax.cond(x[0] > 0, inner, lambda x: x, primitive.bind(x))

    jaxpr = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3,), "float32")).jaxpr
    assert len(list(resources._calls(jaxpr))) == 2


@pytest.mark.parametrize("name", GPUS)
def test_target_config_describes_the_gpu(name):
    gpu, text = GPUS[name], topologies.target_config(name)
    assert f"shared_memory_per_block_optin: {gpu.shared_bytes} " in text
    assert f"memory_bandwidth: {gpu.hbm_bandwidth:.0f} " in text
    assert re.search(rf"{{ major: {gpu.capability // 10} minor: {gpu.capability % 10} }}", text)
    assert text.count("{") == text.count("}")


def test_a_kernel_within_all_limits_has_no_exceeded_limits():
    assert resources.exceeded_limits("sm_90", KERNEL) == []


@pytest.mark.parametrize(
    "change,message",
    [
        ({"spills": 8}, "8 bytes spilled, at most 0"),
        ({"shared_bytes": 170 << 10}, "174080 bytes of shared memory, at most 166912"),
        ({"tensor_columns": 640}, "640 columns of tensor memory, at most 512"),
    ],
)
def test_each_exceeded_limit_is_reported(change, message):
    (complaint,) = resources.exceeded_limits("sm_80", KERNEL._replace(**change))
    assert complaint == f"mlstm_h on sm_80: {message}"


def test_cases_cover_every_width_and_part():
    cases = list(gpu_resources.cases(Arguments(ops=("mlstm",), dtypes=("bfloat16",))))
    assert len(cases) == 4 * 3
    assert {case.T for case in cases if case.part == "decode"} == {1}
    narrow = list(gpu_resources.cases(Arguments(widths=(64,))))
    assert {(case.op, case.K) for case in narrow} == {("mlstm", 64), ("slstm", 64)}


def test_table_has_a_column_per_chip_and_marks_exceeded_limits():
    record = {"K": 64, "V": 128, "dtype": "bfloat16", "complaints": [], **KERNEL._asdict()}
    records = [
        {**record, "chip": "sm_80", "spills": 4, "complaints": ["spills"]},
        {**record, "chip": "sm_90"},
    ]
    assert gpu_resources.table(records).splitlines() == [
        "| kernel | K, V, dtype | sm_80 | sm_90 |",
        "|---|---|---|---|",
        "| `mlstm_h` | 64, 128, bfloat16 | 128 r, 4 B, 64 KiB, 8 w, 2 s ! "
        "| 128 r, 0 B, 64 KiB, 8 w, 2 s |",
    ]
