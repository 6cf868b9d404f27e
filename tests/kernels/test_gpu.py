"""Device and package checks of the Triton kernels, and the arguments passed to jax-triton."""

import importlib.metadata
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import common, gpu
from pallas_kernels.hardware import ARCHITECTURES

INSTALL_HINT = "install the versions that match this jax: `pip install xlstm-jax[gpu]`"
PAIRS = {"0.10": ("0.10.2", "0.3.1"), "0.11": ("0.11.0", "0.4.0")}
"""Compatible versions of jax and jax-triton, by jax release."""


@pytest.fixture(autouse=True)
def _clear_caches():
    """Clears the process-wide caches of `gpu` before and after every test."""
    cached = [function for function in vars(gpu).values() if hasattr(function, "cache_clear")]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def set_device(monkeypatch):
    """A function that makes `jax.devices` return a single fake device."""

    def set_fake(kind: str, **attributes):
        device = SimpleNamespace(device_kind=kind, **attributes)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])

    return set_fake


@pytest.fixture
def install(monkeypatch):
    """A function that installs fake triton and jax-triton modules and package versions.

    `compile` stands for the compilation of a kernel, which needs the real modules.
    """

    def install_fakes(
        jax_version="0.10.2",
        jax_triton_version="0.3.1",
        *,
        interpret=False,
        call=None,
        compile=lambda chip: None,
    ):
        nvidia = SimpleNamespace(ptxas=SimpleNamespace(path="older"), ptxas_blackwell="newer")
        runtime = SimpleNamespace(interpret=interpret)
        triton = SimpleNamespace(knobs=SimpleNamespace(runtime=runtime, nvidia=nvidia))
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.setitem(sys.modules, "jax_triton", SimpleNamespace(triton_call=call))
        versions = {"jax": jax_version, "jax-triton": jax_triton_version, "triton": "3.6.0"}
        monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
        monkeypatch.setattr(gpu, "_compile_probe", compile)
        return triton

    return install_fakes


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
def test_current_chip_is_the_newest_known_architecture_up_to_the_capability(
    set_device, capability, name
):
    set_device("some GPU", compute_capability=capability)
    assert gpu.current_chip() == name


def test_current_chip_without_a_gpu_is_the_ahead_of_time_target():
    assert gpu.current_chip() is None
    with common.compiled_for("sm_90"):
        assert gpu.current_chip() == "sm_90"


def test_architectures_are_sorted_by_capability():
    """`current_chip` relies on this order."""
    capabilities = [chip.capability for chip in ARCHITECTURES.values()]
    assert capabilities == sorted(capabilities)
    assert [f"sm_{capability}" for capability in capabilities] == list(ARCHITECTURES)
    assert capabilities[0] == gpu.MIN_CAPABILITY


# Refusals


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_gpu_with_compatible_packages_is_supported(set_device, install, capability, pair):
    set_device("some GPU", compute_capability=capability)
    install(*pair)
    assert gpu.refusal() is None


def test_devices_other_than_nvidia_gpus_are_refused(set_device, install):
    install()
    assert gpu.refusal() == "it needs an NVIDIA GPU, got 'cpu'"
    set_device("AMD Instinct MI210", platform="gpu", compute_capability="gfx90a")
    assert gpu.refusal() == (
        "it is compiled for NVIDIA GPUs only, not for 'AMD Instinct MI210', an AMD GPU (ROCm)"
    )


@pytest.mark.parametrize("capability", ["7.5", "6.1"])
def test_gpus_older_than_ampere_are_refused(set_device, install, capability):
    install()
    set_device("Tesla T4", compute_capability=capability)
    assert gpu.refusal() == (
        f"it needs compute capability 8.0 (Ampere) or higher, a Tesla T4 has {capability}"
    )


def test_ahead_of_time_target_needs_no_gpu(install):
    install()
    with common.compiled_for("sm_90"):
        assert gpu.refusal() is None


def environment_refusal() -> str | None:
    """The refusal for an ahead-of-time target, which depends only on the installed packages."""
    with common.compiled_for("sm_80"):
        return gpu.refusal()


@pytest.mark.parametrize(
    "module,package",
    [("triton", "triton"), ("jax_triton", "jax-triton")],
    ids=["triton", "jax-triton"],
)
def test_missing_package_is_named(monkeypatch, install, module, package):
    install()
    monkeypatch.setitem(sys.modules, module, None)
    assert environment_refusal() == f"{package} is not installed; {INSTALL_HINT}"


@pytest.mark.parametrize(
    "source,message",
    [
        (
            "raise AttributeError('jax has no attribute core')",
            "jax-triton cannot be imported (AttributeError: jax has no attribute core)",
        ),
        (
            "import missing_module",
            "jax-triton cannot be imported (No module named 'missing_module')",
        ),
    ],
    ids=["AttributeError", "ModuleNotFoundError"],
)
def test_refusal_contains_the_import_error_of_jax_triton(
    monkeypatch, install, tmp_path, source, message
):
    install()
    monkeypatch.delitem(sys.modules, "jax_triton")
    (tmp_path / "jax_triton.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert environment_refusal() == f"{message}; {INSTALL_HINT}"


def test_refusal_names_the_versions_that_cannot_compile_a_kernel(install):
    compilations = []

    def compile_probe(chip):
        compilations.append(chip)
        raise TypeError("object.__new__() takes exactly one argument\n(the type to instantiate)")

    install("0.11.2", "0.4.1", compile=compile_probe)
    refusals = {environment_refusal() for _ in range(3)}
    assert refusals == {
        "jax 0.11.2, jax-triton 0.4.1, triton 3.6.0 together cannot compile a kernel for sm_80 "
        f"(TypeError: object.__new__() takes exactly one argument); {INSTALL_HINT}"
    }
    assert compilations == ["sm_80"]


def test_a_kernel_is_compiled_once_per_chip(install):
    compilations = []
    install(compile=compilations.append)
    for chip in ("sm_80", "sm_90", "sm_80"):
        with common.compiled_for(chip):
            assert gpu.refusal() is None
    assert compilations == ["sm_80", "sm_90"]


def test_triton_interpret_mode_is_refused(install):
    install(interpret=True, compile=None)  # nothing is compiled
    assert (
        environment_refusal()
        == "TRITON_INTERPRET is set, which disables Triton's compiler; unset it"
    )


def test_interpreter_requires_triton_in_interpret_mode(monkeypatch, install):
    install(interpret=True)
    assert gpu.interpreter_refusal() is None
    install(interpret=False)
    assert gpu.interpreter_refusal() == (
        "Triton's interpreter is off; set TRITON_INTERPRET=1 before triton is imported"
    )
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpu.interpreter_refusal() == "triton is not installed; `pip install triton`"


# jax-triton


KERNEL = SimpleNamespace()
OUT_SHAPE = (jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.bfloat16))


@pytest.fixture
def triton_kwargs(install):
    """A function that calls `gpu.call` and returns the keyword arguments of `triton_call`."""

    def call(pair: str, **settings):
        recorded = []

        def triton_call(*arrays, **kwargs):
            recorded.append((arrays, kwargs))
            return ("x", "y")

        install(*PAIRS[pair], call=triton_call)
        settings = dict(name="a_kernel", grid=(4, 2), SIZE=3) | settings
        assert gpu.call(KERNEL, ("a", "b"), OUT_SHAPE, **settings) == ("x", "y")
        ((arrays, kwargs),) = recorded
        assert arrays == ("a", "b")
        return kwargs

    with pytest.MonkeyPatch.context() as patch:
        # Run-time type checks reject the strings that stand for arrays.
        patch.setattr(gpu, "call", getattr(gpu.call, "__wrapped__", gpu.call))
        yield call


every_pair = pytest.mark.parametrize("pair", PAIRS)


@every_pair
def test_output_shapes_use_the_keyword_of_the_jax_triton_version(triton_kwargs, pair):
    kwargs = triton_kwargs(pair)
    expected, other = ("out_type", "out_shape") if pair == "0.11" else ("out_shape", "out_type")
    assert kwargs[expected] == OUT_SHAPE and other not in kwargs


@every_pair
def test_kernel_grid_and_constants_are_forwarded(triton_kwargs, pair):
    kwargs = triton_kwargs(pair, num_warps=8, num_stages=3)
    assert kwargs["kernel"] is KERNEL
    expected = dict(name="a_kernel", grid=(4, 2), num_warps=8, num_stages=3, SIZE=3)
    assert {key: kwargs[key] for key in expected} == expected


@every_pair
@pytest.mark.parametrize("target,capability", [("sm_80", 80), ("sm_100", 100), (None, None)])
def test_target_sets_the_compute_capability(triton_kwargs, pair, target, capability):
    assert triton_kwargs(pair, target=target)["compute_capability"] == capability


@every_pair
def test_results_have_buffers_of_their_own(triton_kwargs, pair):
    assert not triton_kwargs(pair).get("input_output_aliases")


@every_pair
def test_both_versions_enable_fp_fusion(triton_kwargs, pair):
    options = {"enable_fp_fusion": True} if pair == "0.11" else None
    assert triton_kwargs(pair).get("backend_options") == options


@pytest.mark.parametrize("path", [None, "/mine"], ids=["unset", "set"])
def test_triton_uses_the_older_ptxas_unless_configured(triton_kwargs, monkeypatch, path):
    monkeypatch.delenv("TRITON_PTXAS_BLACKWELL_PATH", raising=False)
    if path is not None:
        monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", path)
    triton_kwargs("0.10")
    ptxas = sys.modules["triton"].knobs.nvidia.ptxas_blackwell
    assert ptxas == ("older" if path is None else "newer")


RULES = {
    "two arguments": lambda used_outputs, equation: (used_outputs, equation),
    "three arguments": lambda used_outputs, live_inputs, equation: (used_outputs, equation),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_jax_0_12_can_remove_unused_calls_of_jax_triton(monkeypatch, install, rule):
    """jax 0.12 passes three arguments to a rule; that of jax-triton 0.4 takes two."""
    rules = {"call": rule}
    partial_eval = SimpleNamespace(dce_rules=rules)
    monkeypatch.setitem(sys.modules, "jax._src.interpreters.partial_eval", partial_eval)
    library = SimpleNamespace(triton_kernel_call_p="call")
    monkeypatch.setitem(sys.modules, "jax_triton.triton_lib", library)
    install("0.11.2", "0.4.1")
    gpu._adapt_dce_rule()
    assert rules == {"call": rule}
    gpu._adapt_dce_rule.cache_clear()
    install("0.12.0", "0.4.1")
    gpu._adapt_dce_rule()
    assert rules["call"]([True], [True], "equation") == ([True], "equation")
