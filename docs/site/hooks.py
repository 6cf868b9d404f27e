"""Hooks of mkdocs: pages made of other files of the repository, links to them, and formulas.

- Markdown files outside `docs` become pages of the site (`PAGES`).
- A linked file of the repository becomes a page with its text, a linked folder a list of files.
- `<!-- members of PACKAGE -->` becomes the reference of what the package exports.
- `reference/commands.md` is made of the commands' `--help`.
- Formulas become MathML while the site is built, so that pages need no script.
"""

import ast
import os
import posixpath
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]

# Files of the repository that are pages of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/README.md": "experiments.md",
    "experiments/benchmarks/README.md": "benchmarks.md",
    "pallas_kernels/README.md": "pallas_kernels.md",
    "tests/golden/README.md": "golden.md",
    "README.md": "index.md",  # that page has a text of its own
}
COPIED = (".png", ".svg", ".json", ".csv")  # files that a page would not show better
LINK = re.compile(r"(\]\(|(?:src|href)=\")(?!https?:|#|mailto:)([^)#\"\s]+)")
FORMULA = re.compile(r"<(span|div) class=\"arithmatex\">\\([(\[])(.*?)\\[)\]]</\1>", re.DOTALL)


def on_files(files, config):
    """Adds the pages that are not in `docs`."""
    sources = {file.src_uri: f"docs/{file.src_uri}" for file in files}
    for source, uri in PAGES.items():
        if uri not in sources:
            text = (ROOT / source).read_text()
            files.append(File.generated(config, uri, content=text))
            sources[uri] = source
    files.append(File.generated(config, "reference/commands.md", content=_commands()))
    config.extra["sources"] = sources
    for uri, source in list(sources.items()):
        if uri.endswith(".md"):
            for target in _links((ROOT / source).read_text(), source):
                _add_source(files, config, target)
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links to files of the repository to their pages."""
    markdown = re.sub(r"^<!-- members of (\S+) -->$", _members, markdown, flags=re.MULTILINE)
    uri = page.file.src_uri
    source = config.extra["sources"].get(uri)
    if source is None:
        return markdown

    def replace(match):
        target = _resolve(match[2], source)
        new = _uri(target)
        if new is None or files.get_file_from_path(new) is None:
            return match[0]
        return match[1] + posixpath.relpath(new, posixpath.dirname(uri) or ".")

    parts = _outside_of_code(markdown)
    parts[::2] = [LINK.sub(replace, text) for text in parts[::2]]
    return "".join(parts)


def on_page_content(html, **_):
    """Replaces formulas by MathML."""

    def convert(match):
        display = "block" if match[2] == "[" else "inline"
        return latex2mathml.converter.convert(unescape(match[3]).strip(), display=display)

    return FORMULA.sub(convert, html)


def _members(match: re.Match) -> str:
    """A reference block for each exported name, at its definition.

    Several functions have the name of the subpackage that defines them, which would hide them.
    """
    package = match[1]
    text = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    blocks = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            blocks += [f"::: {node.module}.{alias.name}" for alias in node.names]
    return "\n\n".join(sorted(blocks, key=lambda block: block.rpartition(".")[2].lower()))


def _commands() -> str:
    script = Path(__file__).with_name("commands.py")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, script], check=True, capture_output=True, text=True, env=env
    ).stdout


def _outside_of_code(markdown: str) -> list[str]:
    """The text of a page, split so that parts of odd index are code blocks and inline code."""
    return re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)


def _links(markdown: str, source: str) -> list[str]:
    texts = _outside_of_code(markdown)[::2]
    return [_resolve(match[2], source) for text in texts for match in LINK.finditer(text)]


def _resolve(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _uri(target: str) -> str | None:
    """The page of a file or folder of the repository; None for what is not in it."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/") and not target.endswith(".py"):
        return target.removeprefix("docs/")
    if not (ROOT / target).exists() or target.startswith(".."):
        return None
    return f"source/{target}" if target.endswith(COPIED) else f"source/{target}.md"


def _add_source(files, config, target: str) -> None:
    uri, path = _uri(target), ROOT / target
    if uri is None or not uri.startswith("source/") or files.get_file_from_path(uri):
        return
    if target.endswith(COPIED):
        files.append(File.generated(config, uri, abs_src_path=str(path)))
        return
    if path.is_dir():
        names = subprocess.run(
            ["git", "ls-files", "."], cwd=path, capture_output=True, text=True
        ).stdout.split()
        names = names or sorted(p.name for p in path.iterdir() if not p.name.startswith((".", "_")))
        body = "\n".join(f"- `{name}`" for name in names)
    else:
        language = {".py": "python", ".sh": "sh", ".toml": "toml"}.get(path.suffix, "text")
        body = f'`````{language} linenums="1"\n{path.read_text()}`````'
    head = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
    files.append(File.generated(config, uri, content=f"{head}# `{target}`\n\n{body}\n"))
