"""Where Triton kernels run and what is said where they cannot, and how jax-triton is called."""

import importlib.metadata
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES

WAY_OUT = "install the versions that match this jax: `pip install xlstm-jax[gpu]`"
PAIRS = {"0.10": ("0.10.2", "0.3.1"), "0.11": ("0.11.0", "0.4.0")}


@pytest.fixture(autouse=True)
def _asked_anew():
    """Nothing that is kept for the process is kept from one test to another."""
    kept = [function for function in vars(gpu).values() if hasattr(function, "cache_clear")]
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def device(monkeypatch):
    """A function that puts a device of this name and capability in front of all others."""

    def put(kind: str, **attributes):
        device = SimpleNamespace(device_kind=kind, **attributes)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])

    return put


@pytest.fixture
def installed(monkeypatch):
    """A function that pretends that modules, and packages of these versions, are there."""

    def pretend(jax_version="0.10.2", jax_triton_version="0.3.1", *, interpret=False, call=None):
        nvidia = SimpleNamespace(ptxas=SimpleNamespace(path="older"), ptxas_blackwell="newer")
        runtime = SimpleNamespace(interpret=interpret)
        triton = SimpleNamespace(knobs=SimpleNamespace(runtime=runtime, nvidia=nvidia))
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=call))
        versions = {"jax": jax_version, "jax-triton": jax_triton_version}
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
        return triton

    return pretend


# Chips


@pytest.mark.parametrize(
    "capability,name",
    [
        ("8.0", "sm_80"),
        ("8.6", "sm_86"),
        ("8.7", "sm_86"),
        ("8.9", "sm_89"),
        ("9.0", "sm_90"),
        ("10.0", "sm_100"),
        ("10.3", "sm_100"),
        ("12.0", "sm_120"),
        ("13.0", "sm_120"),
        ("7.5", None),
        ("gfx90a", None),
    ],
)
def test_the_current_chip_is_the_newest_known_one_that_is_not_newer(device, capability, name):
    device("some GPU", compute_capability=capability)
    assert gpu.current_chip() == name


def test_without_a_gpu_there_is_no_current_chip_unless_one_is_compiled_for():
    assert gpu.current_chip() is None
    with common.compiled_for("sm_90"):
        assert gpu.current_chip() == "sm_90"


def test_chips_are_in_the_order_of_their_capabilities():
    """The current one is the last that is not newer."""
    capabilities = [chip.capability for chip in ARCHITECTURES.values()]
    assert capabilities == sorted(capabilities)
    assert [f"sm_{capability}" for capability in capabilities] == list(ARCHITECTURES)
    assert capabilities[0] == gpu.MIN_CAPABILITY


# Refusals


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_a_gpu_with_the_right_packages_is_not_refused(device, installed, capability, pair):
    device("some GPU", compute_capability=capability)
    installed(*pair)
    assert gpu.refusal() is None


def test_a_device_that_is_no_gpu_of_nvidia_is_refused(device, installed):
    installed()
    assert gpu.refusal() == "it needs an NVIDIA GPU, got 'cpu'"
    device("AMD Instinct MI210", compute_capability="gfx90a")
    assert gpu.refusal() == "it needs an NVIDIA GPU, got 'AMD Instinct MI210'"


@pytest.mark.parametrize("capability", ["7.5", "6.1"])
def test_a_gpu_older_than_ampere_is_refused(device, installed, capability):
    installed()
    device("Tesla T4", compute_capability=capability)
    assert gpu.refusal() == (
        f"it needs compute capability 8.0 (Ampere) or higher, a Tesla T4 has {capability}"
    )


def test_a_chip_to_compile_for_need_not_be_here(installed):
    installed()
    with common.compiled_for("sm_90"):
        assert gpu.refusal() is None


def refused_here() -> str | None:
    """What is said of the environment where the chip is not in question."""
    with common.compiled_for("sm_80"):
        return gpu.refusal()


@pytest.mark.parametrize(
    "module,package", [("triton", "triton"), ("jax_triton", "jax-triton")], ids=["triton", "bridge"]
)
def test_a_package_that_is_missing_is_named(monkeypatch, installed, module, package):
    installed()
    monkeypatch.setitem(sys.modules, module, None)
    assert refused_here() == f"{package} is not installed; {WAY_OUT}"


@pytest.mark.parametrize(
    "source,sentence",
    [
        (
            "raise AttributeError('jax has no attribute core')",
            "jax-triton cannot be imported (AttributeError: jax has no attribute core)",
        ),
        (
            "import a_module_that_nobody_has",
            "jax-triton cannot be imported (No module named 'a_module_that_nobody_has')",
        ),
    ],
    ids=["an attribute", "a module"],
)
def test_what_jax_triton_raises_when_it_is_imported_is_passed_on(
    monkeypatch, installed, tmp_path, source, sentence
):
    installed()
    monkeypatch.delitem(sys.modules, "jax_triton")
    (tmp_path / "jax_triton.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert refused_here() == f"{sentence}; {WAY_OUT}"


@pytest.mark.parametrize(
    "versions", [("0.11.0", "0.3.1"), ("0.10.2", "0.4.0"), ("1.0.0", "0.3.1")], ids="-".join
)
def test_versions_that_do_not_belong_together_are_refused(installed, versions):
    installed(*versions)
    said = f"jax {versions[0]}, jax-triton {versions[1]} do not match; {WAY_OUT}"
    assert refused_here() == said


def test_where_triton_interprets_it_compiles_nothing(installed):
    installed(interpret=True)
    assert refused_here() == "TRITON_INTERPRET is set, which disables Triton's compiler; unset it"


def test_the_interpreter_needs_triton_and_to_be_asked_for_in_time(monkeypatch, installed):
    installed(interpret=True)
    assert gpu.interpreter_refusal() is None
    installed(interpret=False)
    assert gpu.interpreter_refusal() == (
        "Triton's interpreter is off; set TRITON_INTERPRET=1 before triton is imported"
    )
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpu.interpreter_refusal() == "triton is not installed; `pip install triton`"


# jax-triton


KERNEL = SimpleNamespace(arg_names=["x", "y", "first", "second", "SIZE"])
OUT = (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bfloat16))


@pytest.fixture
def called(installed):
    """A function that calls a kernel with fake packages: positional and named arguments there."""

    def call(pair: str, **settings):
        seen = []

        def triton_call(*arrays, **named):
            if pair == "0.11":
                message = "input_output_aliases is deprecated, use mutable arrays"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            seen.append((arrays, named))
            return ("the", "results")

        installed(*PAIRS[pair], call=triton_call)
        settings = dict(name="a_kernel", grid=(4, 2), SIZE=3) | settings
        assert gpu.call(KERNEL, ("a", "b"), OUT, **settings) == ("the", "results")
        ((arrays, named),) = seen
        assert arrays == ("a", "b")
        return named

    with pytest.MonkeyPatch.context() as patch:
        # Strings stand for arrays, which the annotations of `call` would not let pass.
        patch.setattr(gpu, "call", getattr(gpu.call, "__wrapped__", gpu.call))
        yield call


every_pair = pytest.mark.parametrize("pair", PAIRS)


@every_pair
def test_shapes_of_results_have_the_name_of_the_version(called, pair):
    named = called(pair)
    right, wrong = ("out_type", "out_shape") if pair == "0.11" else ("out_shape", "out_type")
    assert named[right] == OUT and wrong not in named


@every_pair
def test_kernel_grid_and_constants_are_passed_on(called, pair):
    named = called(pair, num_warps=8, num_stages=3)
    assert named["kernel"] is KERNEL
    expected = dict(name="a_kernel", grid=(4, 2), num_warps=8, num_stages=3, SIZE=3)
    assert {key: named[key] for key in expected} == expected


@every_pair
@pytest.mark.parametrize("target,capability", [("sm_80", 80), ("sm_100", 100), (None, None)])
def test_a_kernel_is_compiled_for_the_target(called, pair, target, capability):
    assert called(pair, target=target)["compute_capability"] == capability


@every_pair
def test_aliases_are_passed_on_and_what_stands_for_them_is_filled_where_it_is_not(called, pair):
    """jax-triton 0.4 gives an aliased result no parameter, 0.3 does."""
    named = called(pair, aliases={0: 1})
    assert dict(named["input_output_aliases"]) == {0: 1}
    assert named.get("second") == (0 if pair == "0.11" else None)
    assert "first" not in named
    assert not called(pair)["input_output_aliases"]


@every_pair
def test_fused_multiplications_are_those_of_both_versions(called, pair):
    options = {"enable_fp_fusion": True} if pair == "0.11" else None
    assert called(pair).get("backend_options") == options


@pytest.mark.parametrize("path", [None, "/mine"], ids=["unset", "set"])
def test_triton_writes_for_the_assembler_of_xla_unless_another_one_is_named(
    called, monkeypatch, path
):
    monkeypatch.delenv("TRITON_PTXAS_BLACKWELL_PATH", raising=False)
    if path is not None:
        monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", path)
    called("0.10")
    assembler = sys.modules["triton"].knobs.nvidia.ptxas_blackwell
    assert assembler == ("older" if path is None else "newer")
