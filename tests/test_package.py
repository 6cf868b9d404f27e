"""The wheel contains two packages, which import without the source tree."""

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# What `import xlstm_jax` must not load: higher layers and kernel languages. The gate arithmetic of
# `pallas_kernels` is plain JAX, which ops use.
NOT_LOADED = (
    "flax", "orbax", "grain", "optax", "tyro", "matplotlib",
    "xlstm_jax.modules", "xlstm_jax.data", "xlstm_jax.train",
    "pallas_kernels.mlstm.api", "jax.experimental.pallas", "jax_triton", "triton", "libtpu",
)  # fmt: skip

PROBE = """
import json, sys
before = set(sys.modules)
import pallas_kernels
kernels = sorted(set(sys.modules) - before)
import xlstm_jax
loaded = sorted(sys.modules)
files = [xlstm_jax.__file__, pallas_kernels.__file__]
print(json.dumps(dict(loaded=loaded, kernels=kernels, files=files, version=xlstm_jax.__version__)))
"""


def run(*command, cwd: pathlib.Path) -> str:
    """Runs a command that must succeed, without the source tree on its path; returns its stdout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    process = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built without isolation so that no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        ROOT,
        cwd=folder,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """A virtual environment with only the wheel installed; a .pth file adds its dependencies."""
    prefix = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(prefix, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", prefix / "bin" / "python", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=prefix.parent)
    # Not PYTHONPATH: a .pth entry comes last on sys.path, and .pth files inside it are ignored.
    (site_packages(prefix) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return prefix


@pytest.fixture(scope="module")
def probe(installed) -> dict:
    """Report of a new interpreter that imports both packages from another directory."""
    python = installed / "bin" / "python"
    return json.loads(run(python, "-I", "-W", "error", "-c", PROBE, cwd=installed.parent))


def site_packages(prefix: pathlib.Path) -> pathlib.Path:
    return next(prefix.glob("lib/python*/site-packages"))


def test_wheel_contains_only_the_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "xlstm_jax",
        "pallas_kernels",
    }
    assert {"xlstm_jax/py.typed", "pallas_kernels/mlstm/tpu_tiles.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installing_the_wheel_adds_only_the_two_packages(installed, probe):
    names = {path.name for path in site_packages(installed).iterdir()}
    info = f"xlstm_jax-{probe['version']}.dist-info"
    assert names == {"xlstm_jax", "pallas_kernels", info, "dependencies.pth"}


def test_packages_import_from_another_directory(installed, probe):
    assert all(pathlib.Path(file).is_relative_to(installed) for file in probe["files"])


def test_importing_xlstm_jax_loads_no_higher_layer_and_no_kernels(probe):
    assert not set(probe["loaded"]) & set(NOT_LOADED)


def test_importing_pallas_kernels_loads_no_other_module(probe):
    assert probe["kernels"] == ["pallas_kernels"]


def test_wheel_installs_the_command(installed):
    assert "train" in run(installed / "bin" / "xlstm-jax", "--help", cwd=installed.parent)
