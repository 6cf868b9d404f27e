"""The documentation runs: Python blocks of every page, and the commands of its shell blocks.

A page runs from top to bottom, in one namespace and an empty folder. Comments that readers of the
page do not see mark what differs:

    <!-- setup ... -->          code before the next block; `tiny` is the config of a short run
    <!-- not run: why -->       the next block is only compiled
    <!-- tests add: --option -->    options that make the commands of the next block quick

A block with `title="FILE"` is also written to that file. Commands are parsed with all their
options; those of the pages in `COMMANDS_RUN` are executed.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import math
import pathlib
import re
import shlex
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import tyro

from xlstm_jax import cli, cpu, data, sharding
from xlstm_jax.config import user_code
from xlstm_jax.data import DataConfig, tokenizers
from xlstm_jax.modules import BLOCKS, LMConfig, MLSTMConfig
from xlstm_jax.ops.mlstm.api import IMPLEMENTATIONS
from xlstm_jax.train import ExperimentConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")]
PAGES += [*ROOT.glob("pallas_kernels/*.md"), *ROOT.glob("tests/golden/*.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted(PAGES)}

BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (setup|not run:|tests add:)\s(.*?)-->\s*\Z", re.DOTALL)

SLOW = {
    "README.md",
    "docs/activations.md",
    "docs/add_sharding_rule.md",
    "docs/data.md",
    "docs/fine_tuning.md",
    "docs/from_pyxlstm.md",
    "docs/from_transformers.md",
    "docs/generation.md",
    "docs/index.md",
    "docs/metrics.md",
    "docs/nnx.md",
    "docs/optimizers.md",
    "docs/own_loop.md",
    "docs/own_mesh.md",
    "docs/recurrences.md",
    "docs/tutorial.md",
}
ALL_DEVICES = {"docs/nnx.md"}  # other meshes are of the first device, or of as many as needed
COMMANDS_RUN = {"docs/tutorial.md"}

MAX_NOT_RUN = 6  # blocks that need hardware, a network, other packages or hours

# Names of examples -> what stands for them when a command is parsed.
EXAMPLES = {
    "CONFIG.py": str(ROOT / "experiments/char_lm.py"),
    "optimal.py": str(ROOT / "experiments/char_lm.py"),
    "plan.py": str(ROOT / "experiments/scaling_micro.py"),
    "TOPOLOGY": "v5e:16x16",
    "FSDP": "16",
    "SEQUENCES": "256",
}


# The name `tiny` in the set-up of a block.
TINY = ExperimentConfig(
    name="tiny",
    model=LMConfig(
        vocab_size=257, dim=16, pattern="m", mlstm=MLSTMConfig(num_heads=2, inner_dim=32)
    ),
    data=DataConfig(source="grammar", seq_len=16, batch_size=2),
    train=TrainConfig(steps=2, eval_every=0, log_every=1, watch="none"),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code, with the comment before it."""

    language: str
    code: str
    title: str | None = None
    setup: str = ""
    not_run: str | None = None
    add: str = ""


def blocks(text: str) -> list[Block]:
    """The code blocks of a page."""
    result, end = [], 0
    for match in BLOCK.finditer(text):
        comment = COMMENT.search(text[end : match.start()])
        kind, value = (comment[1], comment[2]) if comment else (None, "")
        title = re.search(r'title="([^"]+)"', match[2])
        result.append(
            Block(
                language=match[1],
                code=match[3],
                title=title[1] if title else None,
                setup=value if kind == "setup" else "",
                not_run=value.strip() if kind == "not run:" else None,
                add=value if kind == "tests add:" else "",
            )
        )
        end = match.end()
    return result


def commands(code: str) -> list[list[str]]:
    """The arguments of each `xlstm-jax` in a shell block."""
    arguments = []
    for line in code.replace("\\\n", " ").splitlines():
        match = re.search(r"--command \"(xlstm-jax [^\"]*)\"|(?:^| -- )(xlstm-jax .*)", line)
        if match:
            lexer = shlex.shlex(match[1] or match[2], posix=True, punctuation_chars="|")
            lexer.whitespace_split = True
            _, *args = itertools.takewhile(lambda word: word != "|", lexer)
            arguments.append(args)
    return arguments


@pytest.fixture
def workdir(tmp_path, monkeypatch, one_device):
    """An empty working directory; registries are restored afterwards, and meshes may be small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu, "prepare", lambda: True)  # it would change this process
    monkeypatch.setattr(user_code, "imported", {})
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=lambda *_: ["results"])
    make_mesh = jax.make_mesh

    def make_small_mesh(shape, *args, **kwargs):
        kwargs.setdefault("devices", jax.devices()[: math.prod(shape)])
        return make_mesh(shape, *args, **kwargs)

    monkeypatch.setattr(jax, "make_mesh", make_small_mesh)
    registries = (BLOCKS, IMPLEMENTATIONS, data.DATASETS, sharding.RULES, tokenizers.TOKENIZERS)
    with contextlib.ExitStack() as stack:
        for registry in registries:
            stack.enter_context(mock.patch.dict(registry))
        yield tmp_path


def run_page(page: str) -> tuple[dict, str]:
    """Runs the blocks of a page; returns the names they define, and what they print."""
    names: dict = {"__name__": "page", "tiny": TINY}
    output = io.StringIO()
    for number, block in enumerate(blocks(PAGES[page])):
        if block.language == "python":
            code = compile(block.code, f"{page}, block {number}", "exec")
            if block.title:
                pathlib.Path(block.title).write_text(block.code)
            if block.not_run is None:
                with contextlib.redirect_stdout(output):
                    exec(compile(block.setup, f"{page}, set-up of block {number}", "exec"), names)
                    exec(code, names)
        elif block.language == "sh" and page in COMMANDS_RUN and block.not_run is None:
            for args in commands(block.code):
                with contextlib.redirect_stdout(output):
                    assert cli.main([*args, *shlex.split(block.add)]) == 0, args
    return names, output.getvalue()


def check_readme(names, output):
    assert names["losses"].shape == (8,)
    finite = jax.tree.map(lambda gradient: jnp.isfinite(gradient).all(), names["gradients"])
    assert all(jax.tree.leaves(finite))


def check_activations(names, output):
    assert [line.split(":")[0] for line in output.splitlines()] == ["m0", "m1", "s0"]


def check_own_loop(names, output):
    variables = names["model"].init(jax.random.key(1), names["tokens"])
    assert names["loss"] < names["loss_fn"](variables, names["tokens"])


CHECKS = {
    "README.md": check_readme,
    "docs/activations.md": check_activations,
    "docs/own_loop.md": check_own_loop,
}


def check_page(page: str) -> None:
    """Runs a page, and compares what it prints with comments such as `print(x)  # -> 3`."""
    with jax.default_device(None) if page in ALL_DEVICES else contextlib.nullcontext():
        names, output = run_page(page)
    code = "".join(block.code for block in blocks(PAGES[page]) if block.not_run is None)
    lines = iter(output.splitlines())
    for expected in re.findall(r"print\(.*\)  # -> (.+)", code):
        is_printed = any(expected in line for line in lines)  # each line counts once
        assert is_printed, f"{page}: {expected!r} is not printed, or not in this order"
    CHECKS.get(page, lambda names, output: None)(names, output)


WITH_PYTHON = [page for page, text in PAGES.items() if "```python" in text]


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page not in SLOW])
def test_code_of_a_page_runs(page, workdir):
    check_page(page)


@pytest.mark.slow
def test_code_of_slow_pages_runs(subtests, workdir):
    for page in sorted(SLOW):
        with subtests.test(page=page):
            check_page(page)


class Parsed(Exception):
    """Raised instead of running a command whose options are valid."""


def parse_only(*args, **kwargs):
    parsed = tyro_cli(*args, **kwargs)
    if not (kwargs.get("return_unknown_args") and parsed[1]):
        raise Parsed
    return parsed


tyro_cli = tyro.cli
WITH_COMMANDS = [
    page
    for page, text in PAGES.items()
    if any(commands(block.code) for block in blocks(text) if block.language == "sh")
]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_of_a_page_have_valid_options(page, workdir, monkeypatch):
    for block in blocks(PAGES[page]):
        if block.language == "python" and block.title:  # a config that commands name
            pathlib.Path(block.title).write_text(block.code)
    monkeypatch.setattr(tyro, "cli", parse_only)
    for block in blocks(PAGES[page]):
        for args in commands(block.code) if block.language == "sh" else ():
            args = [arg if pathlib.Path(arg).exists() else EXAMPLES.get(arg, arg) for arg in args]
            if args == ["--version"]:
                continue
            with pytest.raises(Parsed):
                importlib.import_module(f"xlstm_jax.cli.{args[0]}").run(args[1:])


def test_few_blocks_are_not_run():
    """Each gives its reason."""
    skipped = [block for text in PAGES.values() for block in blocks(text) if block.not_run]
    assert len([block for block in skipped if block.language == "python"]) <= MAX_NOT_RUN


def test_blocks_with_commands_are_marked_as_shell():
    for page, text in PAGES.items():
        for block in blocks(text):
            if re.search(r"^(xlstm-jax|make|python|pip) ", block.code, re.MULTILINE):
                assert block.language == "sh", f"{page}: ```sh before {block.code[:60]!r}"
