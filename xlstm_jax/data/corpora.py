"""Built-in text: what the running Python installation carries, read where it lies.

Nothing is copied into the package. The texts differ between Python versions, so every description
carries the version and a hash. Source list: PSF licence, sizes for Python 3.11.
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

from xlstm_jax.config import ConfigError
from xlstm_jax.data import grammar
from xlstm_jax.data.readers import Corpus, Document, read_folder, split_by_hash

_log = logging.getLogger(__name__)
_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def _folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib() -> Iterator[Document]:
    """Source code of the standard library without its tests: 733 files, 12.1 MB."""
    for document in read_folder(_folder(), ["*.py"], skip=_SKIP):
        # These list the paths of the machine that built this Python: not source, never the same.
        if not document.name.startswith("_sysconfigdata"):
            yield document


def topics() -> Iterator[Document]:
    """The reference topics behind `help()`: 79 texts, 0.5 MB."""
    try:
        entries: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions strip it
        return
    for name in sorted(entries):
        yield Document(name, entries[name].encode())


def unicode() -> Iterator[Document]:
    """Names of the characters 0..0x1FFFF, one a line, 256 characters a document: 1.9 MB."""
    for start in range(0, 0x20000, 0x100):
        names = (unicodedata.name(chr(code), "") for code in range(start, start + 0x100))
        if text := "\n".join(filter(None, names)):
            yield Document(f"{start:05X}", text.encode() + b"\n")


def texts() -> Iterator[Document]:
    """What else there is to read: the licence, help, news and credits, a poem: 0.2 MB."""
    for document in read_folder(_folder(), ["*.txt", "*.html", "*.rst"], skip=_SKIP):
        # In parts of 50 lines: these are too few files to give every split some.
        lines = document.data.splitlines(keepends=True)
        for start in range(0, len(lines), 50):
            yield Document(f"{document.name}:{start + 1}", b"".join(lines[start : start + 50]))
    poem = _folder() / "this.py"  # importing it would print it
    if poem.is_file() and (cipher := re.search(r'"""(.*?)"""', poem.read_text(), re.DOTALL)):
        yield Document("this", codecs.decode(cipher[1], "rot13").encode())


# The order in which they stand in for the first where an installation lacks it.
CORPORA: dict[str, Callable[[], Iterable[Document]]] = {
    "stdlib": stdlib,
    "topics": topics,
    "unicode": unicode,
    "texts": texts,
    "grammar": grammar.documents,
}


def read_corpus(name: str) -> Corpus:
    """The built-in corpus of that name, split by content hash.

    The default corpus, "stdlib", is replaced by the next one that this Python has, with a warning
    and under its own name: a machine without library sources can still train.

    Raises:
        ConfigError: another corpus was asked for and this Python does not carry it.
    """
    candidates = list(CORPORA) if name == "stdlib" else [name]
    for candidate in candidates:
        corpus = split_by_hash(candidate, CORPORA[candidate]())
        if all(corpus.documents.values()):
            if candidate != name:
                _log.warning("this Python has no corpus %r; using %r instead", name, candidate)
            return corpus
    raise ConfigError(
        f"data.source={name!r} must be part of the running Python ({platform.python_version()}), "
        "and it is not; use data.source='grammar', which is written by the library itself."
    )
