"""Temporary stand-ins with the interfaces of `data.tokenizers` and `data.chat`."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers as old


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
