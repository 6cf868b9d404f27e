"""`.ci/python` finds a Python that works, and `constraints` pins all that installing needs."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["compile"], *EXTRAS["hf"]]
FILES = sorted(ROOT.glob("constraints/*.txt"))


def _command(path: pathlib.Path, script: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _python(path: pathlib.Path):
    _command(path, f'exec "{sys.executable}" "$@"')


def _find(path: pathlib.Path, *commands: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{path}:/usr/bin:/bin"}
    return subprocess.run([ROOT / ".ci/python", *commands], env=env, text=True, capture_output=True)


def test_first_python_that_runs_is_chosen(tmp_path):
    """The first command fails, as those of version managers do for versions not selected."""
    _command(tmp_path / "python3.13", "exit 127")
    _python(tmp_path / "python3.14")
    _python(tmp_path / "python3.12")
    assert _find(tmp_path).stdout == f"{tmp_path}/python3.14\n"


def test_python_without_ensurepip_is_not_chosen(tmp_path):
    _command(
        tmp_path / "python3.13", f'[ "$1" = -c ] && exec "{sys.executable}" -c "import absent"'
    )
    _python(tmp_path / "python3.14")
    assert _find(tmp_path).stdout == f"{tmp_path}/python3.14\n"


def test_setup_finds_a_python_that_pyenv_has_not_selected(tmp_path):
    _command(tmp_path / "pyenv", f"echo {tmp_path}/root")
    _command(tmp_path / "python3.13", "exit 127")
    installed = tmp_path / "root/versions/3.13.1/bin/python3.13"
    _python(installed)
    assert _find(tmp_path, "python3.13").stdout == f"{installed}\n"


def test_error_without_a_python_is_one_line(tmp_path):
    _command(tmp_path / "python3.10", f'exec "{sys.executable}" -c "raise SystemExit(1)"')
    result = _find(tmp_path, "python3.10")
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(
        r"xlstm-jax needs Python 3.11 or newer .* python3.10; .*PYTHON=.*\n", result.stderr
    )


def _pins(file: pathlib.Path) -> dict[str, str]:
    lines = (line for line in file.read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_constraints_pin_every_requirement(file):
    """With a version that the requirement allows; on Linux, where all of them apply."""
    python = re.sub(r"py3(\d+)", r"3.\1", file.stem)
    environment = {"python_version": python, "sys_platform": "linux"}
    for requirement in map(Requirement, INSTALLED):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(_pins(file)[canonicalize_name(requirement.name)])


def test_readme_names_the_tested_versions():
    (sentence,) = re.findall(r"^Tested on .*?\.\s", (ROOT / "README.md").read_text(), re.M | re.S)
    for file in FILES:
        jax = ".".join(_pins(file)["jax"].split(".")[:2])
        assert f"Python 3.{file.stem[3:]} with jax {jax}" in " ".join(sentence.split())
