"""The storeys of the house, read off the import statements: nothing imports upwards.

Imports inside functions count like those at the top; what a name stands for is not followed.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

STOREY_0 = ("xlstm_jax.typing", "xlstm_jax.config")
STOREY_2 = (*STOREY_0, "xlstm_jax.cells", "pallas_kernels", "xlstm_jax.ops", "xlstm_jax.sharding")
STOREY_3 = (*STOREY_2, "xlstm_jax.modules", "xlstm_jax.data")
STOREY_4 = (
    *STOREY_3,
    "xlstm_jax",  # the bare package, for its version
    "xlstm_jax.train",
    "xlstm_jax.generate",
    "xlstm_jax.evaluate",
    "xlstm_jax.convert",
    "xlstm_jax.scaling",
    "xlstm_jax.plan",
    "xlstm_jax.check",
    "xlstm_jax.report",
    "xlstm_jax.compat",
    "xlstm_jax.flops",
    "xlstm_jax.cpu",
)
STOREY_5 = (*STOREY_4, "xlstm_jax.cli", "xlstm_jax.__main__")

# Room -> what of ours it may import besides itself. A room that is not here has no storey.
MAY_IMPORT = {
    "xlstm_jax.typing": (),
    "xlstm_jax.config": ("xlstm_jax.typing",),
    "xlstm_jax.sharding": STOREY_0,
    "xlstm_jax.cells": STOREY_0,
    "pallas_kernels": (),
    "xlstm_jax.ops": (*STOREY_0, "xlstm_jax.cells", "pallas_kernels", "xlstm_jax.sharding"),
    "xlstm_jax": (*STOREY_0, "xlstm_jax.cells", "xlstm_jax.ops"),
    "xlstm_jax.data": STOREY_0,
    "xlstm_jax.modules": STOREY_2,
    "xlstm_jax.train": (*STOREY_3, "xlstm_jax"),
    "xlstm_jax.generate": (*STOREY_3, "xlstm_jax", "xlstm_jax.train.checkpoint"),
    "xlstm_jax.evaluate": (
        *STOREY_3,
        "xlstm_jax",
        *(f"xlstm_jax.train.{name}" for name in ("checkpoint", "losses")),
    ),
    "xlstm_jax.convert": (*STOREY_3, "xlstm_jax", "xlstm_jax.train.checkpoint"),
    "xlstm_jax.scaling": (*STOREY_3, "xlstm_jax", "xlstm_jax.train"),
    "xlstm_jax.plan": (
        *STOREY_3,
        "xlstm_jax",
        "xlstm_jax.flops",
        *(
            f"xlstm_jax.train.{name}"
            for name in ("config", "losses", "optimizer", "program", "state")
        ),
    ),
    "xlstm_jax.check": (*STOREY_3, "xlstm_jax", "xlstm_jax.train.step"),
    "xlstm_jax.report": (*STOREY_3, "xlstm_jax"),
    "xlstm_jax.compat": (*STOREY_3, "xlstm_jax"),
    "xlstm_jax.flops": (*STOREY_3, "xlstm_jax"),
    "xlstm_jax.cpu": (),
    "xlstm_jax.cli": STOREY_4,
    "xlstm_jax.__main__": STOREY_5,
    "experiments": (*STOREY_5, "tests.workloads"),
}

# Room -> the only packages of others it may import, the standard library aside.
OTHERS_ONLY = {
    "pallas_kernels": {"jax", "numpy", "triton"},
    "xlstm_jax.typing": {"jax", "jaxtyping"},
    "xlstm_jax.config": {"jax", "jaxtyping"},
    "xlstm_jax.sharding": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax.cells": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax.ops": {"jax", "jaxtyping", "numpy"},
    "xlstm_jax": set(),
    "xlstm_jax.cpu": {"jax"},
}

# Others' package -> the rooms it may appear in (a file counts as a room).
ONLY_IN = {
    "flax": ("xlstm_jax.modules", "xlstm_jax.compat", "xlstm_jax.train.state", "experiments"),
}

# Others' package -> how the files are called that import it; no others do where it is missing.
ONLY_IN_FILES = {"triton": "triton_"}

# Room -> packages of others it must do without: data are prepared where there is no accelerator.
WITHOUT = {"xlstm_jax.data": {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}}

OURS = ("xlstm_jax", "pallas_kernels", "experiments", "tests")


def belongs_to(target: str, room: str) -> bool:
    """Whether the dotted name lies in the room; of the bare package only its own names do."""
    if room == "xlstm_jax":
        return target == room or target.startswith("xlstm_jax.__version__")
    return target == room or target.startswith(room + ".")


def room_of(module: str) -> str | None:
    """The room of the table that a module stands in."""
    return next((room for room in MAY_IMPORT if belongs_to(module, room)), None)


def imported_names(module: str, source: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Line and full dotted name of everything that the source of `module` imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            kept = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*kept, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return names


def fault(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    room, top = room_of(module), target.split(".")[0]
    if room is None:
        return "stands in no room of the table"
    if top in OURS:
        allowed = (room, *MAY_IMPORT[room])
        upwards = not any(belongs_to(target, other) for other in allowed)
        return "is not below it" if upwards else None
    if top in sys.stdlib_module_names:
        return None
    if room in OTHERS_ONLY and top not in OTHERS_ONLY[room]:
        return f"is none of {sorted(OTHERS_ONLY[room])}"
    if top in WITHOUT.get(room, ()):
        return "is what this room does without"
    if top in ONLY_IN and not any(belongs_to(module, home) for home in ONLY_IN[top]):
        return f"is for {', '.join(ONLY_IN[top])}"
    start = ONLY_IN_FILES.get(top, "")
    if room != "experiments" and not module.split(".")[-1].startswith(start):
        return f"is for files called {start}*"
    return None


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    """One sentence for each import of the source that breaks a rule."""
    return [
        f"{module}, line {line}: {target} {reason}."
        for line, target in imported_names(module, source, is_package)
        if (reason := fault(module, target))
    ]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[pathlib.Path]:
    folders = ("xlstm_jax", "pallas_kernels", "experiments")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_nothing_imports_upwards():
    found = []
    for path in source_files():
        found += faults(module_name(path), path.read_text(), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_file_stands_in_a_room():
    assert not [path for path in source_files() if room_of(module_name(path)) is None]


def test_the_kernels_are_among_the_files_read():
    assert "pallas_kernels" in map(module_name, source_files())


@pytest.mark.parametrize(
    "module, source",
    [
        ("xlstm_jax.cells.slstm", "from xlstm_jax import ops"),
        ("xlstm_jax.cells.slstm", "import xlstm_jax.ops.dispatch"),
        ("xlstm_jax.cells.slstm", "from ..modules import lm"),
        ("xlstm_jax.cells.slstm", "def late():\n    from xlstm_jax.train import loop"),
        ("xlstm_jax.cells.slstm", "from xlstm_jax import sharding"),
        ("xlstm_jax.ops.mlstm", "import flax.linen as nn"),
        ("xlstm_jax.ops.mlstm", "import xlstm_jax"),
        ("xlstm_jax.modules.lm", "from xlstm_jax import data"),
        ("xlstm_jax.data.loader", "import jax.numpy as jnp"),
        ("xlstm_jax.data.loader", "from xlstm_jax.modules import LM"),
        ("xlstm_jax.data.loader", "from xlstm_jax import cells"),
        ("xlstm_jax.train.step", "from flax import struct"),
        ("xlstm_jax.train.loop", "from xlstm_jax import flops"),
        ("xlstm_jax.train.loop", "from xlstm_jax.cli import main"),
        ("xlstm_jax.generate.decode", "from xlstm_jax.train import state"),
        ("xlstm_jax.generate.decode", "from xlstm_jax.evaluate import perplexity"),
        ("xlstm_jax.plan", "from xlstm_jax.train.checkpoint import Checkpointer"),
        ("xlstm_jax.config", "import numpy"),
        ("xlstm_jax.cli", "from experiments import char_lm"),
        ("xlstm_jax.cli", "import tests.conftest"),
        ("xlstm_jax.surprise", "import os"),
        ("pallas_kernels.common", "from xlstm_jax.typing import Array"),
        ("pallas_kernels.common", "import optax"),
        ("pallas_kernels.gpu", "import triton"),
        ("pallas_kernels.mlstm.vjp", "def late():\n    import triton.language as tl"),
        ("xlstm_jax.ops.triton_mlstm", "import triton"),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(module, source):
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        (
            "xlstm_jax.cells.slstm",
            "import jax\nfrom . import lstm\nfrom xlstm_jax.typing import Array",
        ),
        ("xlstm_jax.ops.mlstm", "def late():\n    from pallas_kernels.mlstm import vjp"),
        ("xlstm_jax.ops.mlstm", "from xlstm_jax.sharding import axes"),
        ("xlstm_jax.modules.lm", "import flax.linen as nn\nfrom xlstm_jax import ops"),
        ("xlstm_jax.data.loader", "import grain\nimport numpy as np\nfrom xlstm_jax import config"),
        ("xlstm_jax.train.state", "from flax import struct"),
        ("xlstm_jax.train.config", "from xlstm_jax.data import DataConfig"),
        ("xlstm_jax.generate.decode", "from xlstm_jax.train import checkpoint"),
        ("xlstm_jax.evaluate.perplexity", "from xlstm_jax.train.checkpoint import restore_params"),
        ("xlstm_jax.train.writers", "from xlstm_jax import __version__"),
        ("xlstm_jax.cli", "import tyro\nfrom xlstm_jax import flops, train"),
        ("pallas_kernels.mlstm.vjp", "import jax\nfrom pallas_kernels import tiles"),
        ("pallas_kernels.mlstm.triton_decode", "import triton\nimport triton.language as tl"),
    ],
)
def test_an_import_that_keeps_the_rules_is_let_pass(module, source):
    assert faults(module, source) == []


def test_a_relative_import_is_resolved_from_a_package_too():
    assert imported_names("xlstm_jax.ops", "from .mlstm import mlstm", is_package=True) == [
        (1, "xlstm_jax.ops.mlstm.mlstm")
    ]
    assert faults("xlstm_jax.ops", "from ..train import loop", is_package=True)
