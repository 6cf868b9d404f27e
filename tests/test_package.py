"""The wheel holds two packages and nothing else, and they import where the source tree is not."""

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

# What `import xlstm_jax` has to do without: the layers above it, and every kernel language. The
# arithmetic of the gates in `pallas_kernels` is plain JAX, which ops share.
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
    """Standard output of a command that has to succeed; nothing of the tree on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The built wheel; without build isolation, so that no network is needed."""
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
    """An environment that holds the wheel alone; its dependencies come from a path file."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, symlinks=True)
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home.parent)
    # A path file, not PYTHONPATH: they come last, and path files within it are not read.
    (site_packages(home) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


@pytest.fixture(scope="module")
def probe(installed) -> dict:
    """What a fresh interpreter reports after importing both packages from another directory."""
    python = installed / "bin" / "python"
    return json.loads(run(python, "-I", "-W", "error", "-c", PROBE, cwd=installed.parent))


def site_packages(home: pathlib.Path) -> pathlib.Path:
    return next(home.glob("lib/python*/site-packages"))


def test_the_wheel_holds_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "xlstm_jax",
        "pallas_kernels",
    }
    assert {"xlstm_jax/py.typed", "pallas_kernels/mlstm/tpu_tiles.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installing_it_installs_nothing_else(installed, probe):
    found = {path.name for path in site_packages(installed).iterdir()}
    info = f"xlstm_jax-{probe['version']}.dist-info"
    assert found == {"xlstm_jax", "pallas_kernels", info, "dependencies.pth"}


def test_both_packages_import_from_another_directory(installed, probe):
    assert all(pathlib.Path(file).is_relative_to(installed) for file in probe["files"])


def test_importing_the_library_loads_no_layer_above_and_no_kernel(probe):
    assert not set(probe["loaded"]) & set(NOT_LOADED)


def test_importing_the_kernels_loads_nothing_more(probe):
    assert probe["kernels"] == ["pallas_kernels"]


def test_the_command_is_installed(installed):
    assert "train" in run(installed / "bin" / "xlstm-jax", "--help", cwd=installed.parent)
