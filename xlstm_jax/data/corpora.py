"""Built-in corpora: text files of the running Python installation.

The texts are not part of the package. They differ between Python versions; every description has
a hash of them. License of the texts: PSF. Sizes are those of Python 3.11.
"""

import codecs
import importlib
import logging
import platform
import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from xlstm_jax.data import grammar
from xlstm_jax.data.documents import Corpus, Document, files, split_by_hash
from xlstm_jax.errors import ConfigError

_log = logging.getLogger(__name__)
# Only the library: no tests and no installed packages, which differ between machines.
_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def _folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(pattern: str) -> Iterator[Document]:
    for name in files.walk(_folder(), _SKIP, follow_links=False):
        if files.matches(name, pattern) and (data := (_folder() / name).read_bytes()):
            yield Document(name, data)


def stdlib() -> Iterator[Document]:
    """Source code of the standard library, without its tests: 733 files, 12.1 MB."""
    for document in _read("*.py"):
        # These contain build paths, which differ between machines with the same Python.
        if not document.name.startswith("_sysconfigdata"):
            yield document


def topics() -> Iterator[Document]:
    """The reference topics of `help()`: 79 texts, 0.5 MB."""
    try:
        entries: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions remove it
        return
    for name in sorted(entries):
        yield Document(name, entries[name].encode())


def unicode() -> Iterator[Document]:
    """Names of the characters 0..0x1FFFF, one per line, 256 characters per document: 1.9 MB."""
    for start in range(0, 0x20000, 0x100):
        names = (unicodedata.name(chr(code), "") for code in range(start, start + 0x100))
        if text := "\n".join(filter(None, names)):
            yield Document(f"{start:05X}", text.encode() + b"\n")


def texts() -> Iterator[Document]:
    """The remaining texts: license, help, news, credits and a poem, 0.2 MB."""
    for document in _read("*.{txt,html,rst}"):
        # In documents of 50 lines: the files are too few for every split to get one.
        lines = document.data.splitlines(keepends=True)
        for start in range(0, len(lines), 50):
            yield Document(f"{document.name}:{start + 1}", b"".join(lines[start : start + 50]))
    poem = _folder() / "this.py"  # read, as importing it prints it
    if poem.is_file() and (cipher := re.search(r'"""(.*?)"""', poem.read_text(), re.DOTALL)):
        yield Document("this", codecs.decode(cipher[1], "rot13").encode())


# Ordered: if an installation lacks "stdlib", the next one in this table replaces it.
CORPORA: dict[str, Callable[[], Iterable[Document]]] = {
    "stdlib": stdlib,
    "topics": topics,
    "unicode": unicode,
    "texts": texts,
    "grammar": grammar.documents,
}


def read_corpus(name: str) -> Corpus:
    """A built-in corpus, split by content hash.

    If this Python lacks the default corpus, "stdlib", the next available one replaces it with a
    warning and is recorded under its own name, so that every machine can train.

    Raises:
        ConfigError: this Python lacks the corpus, and it is not the default.
    """
    candidates = list(CORPORA) if name == "stdlib" else [name]
    for candidate in candidates:
        corpus = split_by_hash(candidate, CORPORA[candidate]())
        if all(corpus.documents.values()):  # a corpus with an empty split counts as absent
            if candidate != name:
                _log.warning("this Python has no corpus %r; using %r instead", name, candidate)
            return corpus
    raise ConfigError(
        f"data.source={name!r} must be part of the running Python ({platform.python_version()}), "
        "but it is absent; use data.source='grammar', which the library generates."
    )
