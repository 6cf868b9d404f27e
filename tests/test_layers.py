"""The layers of the import graph, read from the import statements: no layer imports a higher one.

Imports inside functions count like those at the top of a module.
"""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LAYER_0 = ("xlstm_jax.typing", "xlstm_jax.errors", "xlstm_jax.config")
LAYER_2 = (*LAYER_0, "xlstm_jax.cells", "pallas_kernels", "xlstm_jax.ops", "xlstm_jax.sharding")
LAYER_3 = (*LAYER_2, "xlstm_jax.modules", "xlstm_jax.data", "xlstm_jax.hub", "xlstm_jax")
LAYER_4 = (
    *LAYER_3,
    "xlstm_jax.train",
    "xlstm_jax.generate",
    "xlstm_jax.evaluate",
    "xlstm_jax.convert",
    "xlstm_jax.plan",
    "xlstm_jax.report",
    "xlstm_jax.scaling",
    "xlstm_jax.compat",
    "xlstm_jax.flops",
    "xlstm_jax.cpu",
    "xlstm_jax.program_cache",
)
LAYER_5 = (*LAYER_4, "xlstm_jax.cli", "xlstm_jax.__main__")

# Package -> first-party packages that it may import besides itself; every module has an entry.
MAY_IMPORT = {
    "xlstm_jax.typing": (),
    "xlstm_jax.errors": (),
    "xlstm_jax.config": ("xlstm_jax.typing", "xlstm_jax.errors"),
    "xlstm_jax.sharding": LAYER_0,
    "xlstm_jax.cells": LAYER_0,
    "pallas_kernels": (),
    "xlstm_jax.ops": (*LAYER_0, "xlstm_jax.cells", "pallas_kernels", "xlstm_jax.sharding"),
    "xlstm_jax": (*LAYER_0, "xlstm_jax.cells", "xlstm_jax.ops"),
    "xlstm_jax.hub": LAYER_0,
    "xlstm_jax.data": (*LAYER_0, "xlstm_jax.hub"),
    "xlstm_jax.modules": LAYER_2,
    "xlstm_jax.train": (*LAYER_3, "xlstm_jax.convert", "xlstm_jax.program_cache"),
    "xlstm_jax.generate": (*LAYER_3, "xlstm_jax.train.checkpoint", "xlstm_jax.train.evaluators"),
    "xlstm_jax.evaluate": (
        *LAYER_3,
        "xlstm_jax.generate",
        "xlstm_jax.train.checkpoint",
        "xlstm_jax.train.evaluators",
        "xlstm_jax.train.losses",
    ),
    "xlstm_jax.convert": LAYER_3,
    "xlstm_jax.plan": (
        *LAYER_3,
        "xlstm_jax.flops",
        "xlstm_jax.train.config",
        "xlstm_jax.train.lora",
        "xlstm_jax.train.losses",
        "xlstm_jax.train.optimizer",
        "xlstm_jax.train.program",
        "xlstm_jax.train.trainable",
    ),
    "xlstm_jax.report": (
        *LAYER_3,
        "xlstm_jax.train.config",
        "xlstm_jax.train.lock",
        "xlstm_jax.train.rundir",
    ),
    "xlstm_jax.scaling": (*LAYER_3, "xlstm_jax.train", "xlstm_jax.flops"),
    "xlstm_jax.compat": (*LAYER_2, "xlstm_jax.modules"),
    "xlstm_jax.flops": LAYER_3,
    "xlstm_jax.cpu": (),
    "xlstm_jax.program_cache": ("xlstm_jax.config",),
    "xlstm_jax.cli": LAYER_4,
    "xlstm_jax.__main__": LAYER_5,
    "experiments": (*LAYER_5, "tests.workloads"),
}

# Package -> the only third-party packages that it may import.
THIRD_PARTY = {
    "pallas_kernels": {"jax", "numpy", "triton"},
    "xlstm_jax.typing": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax.errors": set(),
    "xlstm_jax.config": {"jax", "jaxtyping"},
    "xlstm_jax.sharding": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax.cells": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax.ops": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax": set(),
    "xlstm_jax.cpu": {"jax"},
    "xlstm_jax.program_cache": {"jax"},
}

# Package -> third-party packages that it may not import. Data preparation must not need JAX.
FORBIDDEN = {"xlstm_jax.data": {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}}

# Third-party package -> the only packages and modules that may import it.
ONLY_IN = {
    "flax": ("xlstm_jax.modules", "xlstm_jax.compat", "xlstm_jax.train.state", "experiments")
}

# Optional third-party package -> name prefix of the only modules that may import it.
MODULE_PREFIX = {"triton": "triton_"}

MAX_CHAIN = 18
"""Modules of the longest chain of imports, which a reader may have to follow."""

FIRST_PARTY = ("xlstm_jax", "pallas_kernels", "experiments", "tests")


def belongs_to(target: str, package: str) -> bool:
    """Whether a dotted name is in a package; `xlstm_jax` stands for its `__init__` alone."""
    if package == "xlstm_jax":
        return target == package or target.startswith("xlstm_jax.__version__")
    return target == package or target.startswith(package + ".")


def package_of(module: str) -> str | None:
    """The entry of `MAY_IMPORT` that a module belongs to."""
    return next((package for package in MAY_IMPORT if belongs_to(module, package)), None)


def imported_names(module: str, source: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that the source of `module` imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            parents = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return names


def violation(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    package, top = package_of(module), target.split(".")[0]
    if package is None:
        return "is imported by a module outside all packages of the table"
    if top in FIRST_PARTY:
        allowed = (package, *MAY_IMPORT[package])
        is_allowed = any(belongs_to(target, other) for other in allowed)
        return None if is_allowed else "is not in a lower layer"
    if top in sys.stdlib_module_names:
        return None
    if package in THIRD_PARTY and top not in THIRD_PARTY[package]:
        return f"is not one of {sorted(THIRD_PARTY[package])}"
    if top in FORBIDDEN.get(package, ()):
        return f"is forbidden in {package}"
    if top in ONLY_IN and not any(belongs_to(module, user) for user in ONLY_IN[top]):
        return f"is allowed only in {', '.join(ONLY_IN[top])}"
    prefix = MODULE_PREFIX.get(top, "")
    if package != "experiments" and not module.split(".")[-1].startswith(prefix):
        return f"is allowed only in modules named {prefix}*"
    return None


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """One message for each import of the source that breaks a rule."""
    return [
        f"{module}, line {line}: {target} {reason}."
        for line, target in imported_names(module, source, is_package)
        if (reason := violation(module, target))
    ]


@functools.cache
def sources() -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module of the repository, without the tests."""
    paths = [
        path
        for folder in ("xlstm_jax", "pallas_kernels", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return {
        ".".join(name[:-1] if name[-1] == "__init__" else name): path
        for name, path in zip(names, paths, strict=True)
    }


@functools.cache
def longest_chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports within the repository that starts at a module."""
    path = sources()[module]
    targets = imported_names(module, path.read_text(), path.name == "__init__.py")
    chains = [longest_chain(name) for _, target in targets if (name := module_of(target, module))]
    return (module, *max(chains, key=len, default=()))


def module_of(target: str, importer: str) -> str | None:
    """The module of the repository that defines a dotted name, unless it is the importer."""
    while target and target not in sources():
        target = target.rpartition(".")[0]
    return target if target and target != importer else None


def test_no_module_imports_a_higher_layer():
    messages = [
        message
        for module, path in sources().items()
        for message in violations(module, path.read_text(), path.name == "__init__.py")
    ]
    assert not messages, "\n".join(messages)


def test_every_module_belongs_to_a_package_of_the_table():
    assert not [module for module in sources() if package_of(module) is None]
    assert {package_of(module) for module in sources()} == set(MAY_IMPORT)


def test_import_chains_are_short():
    library = [module for module in sources() if not belongs_to(module, "experiments")]
    longest = max(map(longest_chain, library), key=len)
    assert len(longest) <= MAX_CHAIN, " -> ".join(longest)


@pytest.mark.parametrize(
    "module, source",
    [
        ("xlstm_jax.cells.slstm", "from xlstm_jax import ops"),
        ("xlstm_jax.cells.slstm", "import xlstm_jax.ops.registry"),
        ("xlstm_jax.cells.slstm", "from ..modules import lm"),
        ("xlstm_jax.cells.slstm", "def late():\n    from xlstm_jax.train import loop"),
        ("xlstm_jax.ops.mlstm", "import flax.linen as nn"),
        ("xlstm_jax.ops.mlstm", "import xlstm_jax"),
        ("xlstm_jax.modules.lm", "from xlstm_jax import data"),
        ("xlstm_jax.data.loader", "import jax.numpy as jnp"),
        ("xlstm_jax.data.loader", "from xlstm_jax.modules import LM"),
        ("xlstm_jax.train.step", "from flax import struct"),
        ("xlstm_jax.train.loop", "from xlstm_jax import flops"),
        ("xlstm_jax.generate.decode", "from xlstm_jax.train import state"),
        ("xlstm_jax.plan", "from xlstm_jax.train.checkpoint import Checkpointer"),
        ("xlstm_jax.compat.layers", "from xlstm_jax import data"),
        ("xlstm_jax.cli", "import tests.conftest"),
        ("xlstm_jax.unknown", "import os"),
        ("pallas_kernels.common", "from xlstm_jax.typing import Array"),
        ("pallas_kernels.common", "import optax"),
        ("pallas_kernels.mlstm.vjp", "def late():\n    import triton.language as tl"),
    ],
)
def test_import_that_breaks_a_rule_is_reported(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("xlstm_jax.cells.slstm", "import jax\nfrom . import lstm\nfrom xlstm_jax import typing"),
        ("xlstm_jax.modules.lm", "import flax.linen as nn\nfrom xlstm_jax import ops"),
        ("xlstm_jax.data.loader", "import grain\nimport numpy as np\nfrom xlstm_jax import config"),
        ("xlstm_jax.evaluate.perplexity", "from xlstm_jax.train.losses import token_sums"),
        ("xlstm_jax.train.writers", "from xlstm_jax import __version__"),
        ("xlstm_jax.cli", "import tyro\nfrom xlstm_jax import flops, train"),
        ("pallas_kernels.mlstm.triton_step", "import triton\nimport triton.language as tl"),
    ],
)
def test_import_that_follows_the_rules_is_accepted(module, source):
    assert violations(module, source) == []


def test_relative_imports_of_a_package_are_resolved():
    assert imported_names("xlstm_jax.ops", "from .mlstm import mlstm", is_package=True) == [
        (1, "xlstm_jax.ops.mlstm.mlstm")
    ]
    assert violations("xlstm_jax.ops", "from ..train import loop", is_package=True)
