"""Temporary stand-ins with the interfaces of `data.documents` and `data.tokenizers`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.data import files
from xlstm_jax.data import tokenizers as old
from xlstm_jax.data.splits import split_by_content
from xlstm_jax.errors import quote


class Document(NamedTuple):
    name: str
    data: bytes
    is_last: bool = True
    messages: list[dict[str, Any]] | None = None


class File(NamedTuple):
    name: str
    path: str
    size: int
    split: Any


def is_rows(file: File) -> bool:
    return files.suffix(file.name) in files.ROWS


def find_files(source: str, pattern: str | None = None, *, split=None) -> list[File]:
    folder = Path(source)
    if not folder.exists():
        raise ConfigError(f"data.source={quote(source)} must be a regular file or a folder.")
    names = [folder.name] if folder.is_file() else list(files.walk(folder))
    folder = folder.parent if folder.is_file() else folder
    return [File(n, str(folder / n), (folder / n).stat().st_size, split) for n in names]


def read(file: File, *, text_field="text", messages_field=None) -> Iterator[tuple[Any, Document]]:
    if not is_rows(file):
        data = Path(file.path).read_bytes()
        for start in range(0, len(data), 1 << 20):
            piece = data[start : start + (1 << 20)]
            last = start + (1 << 20) >= len(data)
            yield file.split or split_by_content(data), Document(file.name, piece, last)
        return
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            row, name = json.loads(line), f"{file.name}:{number}"
            if messages_field:
                document = Document(name, b"", True, row[messages_field])
                yield file.split or split_by_content(line), document
                continue
            if text_field not in row:
                raise ConfigError(f"{name} has no column {text_field!r}; set text_field.")
            if data := row[text_field].encode():
                yield file.split or split_by_content(data), Document(name, data)


class _Byte:
    name, vocab_size, eos_id, sha256 = "byte", 257, 256, hashlib.sha256(b"byte").hexdigest()
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, text):
        return old.get("byte").encode(text)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return old.get("byte").decode(ids)

    def num_bytes(self, ids):
        return old.get("byte").num_bytes(ids)

    def save(self, folder):
        pass


class _HF:
    name = "tokenizer.json"

    def __init__(self, path):
        from tokenizers import Tokenizer

        self._tok = Tokenizer.from_file(path)
        self._data = Path(path).read_bytes()
        self.vocab_size = self._tok.get_vocab_size()
        self.sha256 = hashlib.sha256(self._data).hexdigest()
        self.eos_id = self.vocab_size - 1

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        strings = [text.decode() for text in texts]
        encoded = self._tok.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(e.ids, np.uint16) for e in encoded]

    def decode(self, ids):
        return self._tok.decode(list(ids))

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self._data)


Tokenizer = Any

TOKENIZERS: dict[str, Any] = {"byte": _Byte()}


def get(name: str) -> Any:
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    return _HF(name)


class ChatTemplate:
    """Every message as role, text and a line end."""

    sha256 = "0" * 64

    def encode(self, tokenizer, messages, name):
        ids, mask = [], []
        for message in messages:
            try:
                head = tokenizer.encode(f"{message['role']}: ")
                text = tokenizer.encode(message["content"] + "\n")
            except (KeyError, TypeError) as error:
                raise ConfigError(f"{name}: chat template failed ({error!r}); fix it.") from error
            ids += [head, text]
            mask += [np.zeros(len(head), bool)]
            mask += [np.full(len(text), message["role"] == "assistant")]
        tokens = np.concatenate([*ids, np.array([tokenizer.eos_id], np.uint16)])
        return tokens, np.concatenate([*mask, np.ones(1, bool)]), sum(map(len, ids))


def load_template(name):
    return ChatTemplate()


def train_bpe(documents, vocab_size, out):
    raise NotImplementedError(sum(map(len, documents)))
