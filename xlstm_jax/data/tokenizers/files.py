"""The files of a tokenizer: their contents, and the name of the eos token."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xlstm_jax.errors import ConfigError, quote, quote_path

JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
SPECIAL_TOKENS, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
MAX_BYTES = 256 << 20
"""Limit of a file. A vocabulary of 250,000 ids has about 20 MB."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

# End-of-document tokens of well-known vocabularies; looked up if no file names one.
_EOS_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|end\u2581of\u2581sentence|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer file and the settings beside it."""

    path: Path
    data: bytes
    settings: Mapping[
        str, Any
    ]  # tokenizer_config.json, and special_tokens_map.json with lower precedence
    template: str | None  # chat_template.jinja

    def eos_token(self, known: Iterable[str]) -> str:
        """The token that ends a document: as the settings say, else one that is well known.

        Args:
            known: the tokens of the vocabulary.

        Raises:
            ConfigError: the settings name no token of the vocabulary, or none is well known.
        """
        known = set(known)
        token = special_token(self.settings, "eos_token", self.path)
        if token is None:
            token = next((token for token in _EOS_TOKENS if token in known), None)
        if token is None or token not in known:
            problem = "no eos token is named" if token is None else f"eos_token={quote(token)}"
            raise ConfigError(
                f"{quote_path(self.path)} needs a token of its vocabulary that ends a document, "
                f'but {problem}; write {{"eos_token": "TOKEN"}} to {CONFIG} beside it.'
            )
        return token

    def save(self, folder: Path, name: str, eos_token: str) -> None:
        """Writes the files, under their usual names, to a folder, which may be new."""
        settings = json.dumps({**self.settings, "eos_token": eos_token}, indent=1) + "\n"
        write(folder / name, self.data)
        write(folder / CONFIG, settings.encode())
        if self.template is not None:
            write(folder / TEMPLATE, self.template.encode())


def special_token(settings: Mapping[str, Any], key: str, path: Path) -> str | None:
    """A token such as "eos_token" in the settings beside `path`; None if they name none.

    Raises:
        ConfigError: the value is not a token.
    """
    value = settings.get(key)
    token = value.get("content") if isinstance(value, Mapping) else value
    if value is None or (isinstance(token, str) and token):
        return token
    raise ConfigError(
        f"{quote_path(path.parent / CONFIG)}: {key} must be a token, got {quote(value)}; correct "
        "it."
    )


def stamp(path: Path) -> tuple[int, int]:
    """Changes with the contents of a file: its time of modification and its size, or zeros."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def read_files(path: Path) -> TokenizerFiles:
    """Reads a tokenizer file and the settings beside it; raises ConfigError if it cannot."""
    settings: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS, CONFIG):  # the latter has precedence
        beside = path.parent / name
        if beside.is_file():
            values = parse_json(read(beside), beside)
            settings |= {key: value for key, value in values.items() if value is not None}
    template = path.parent / TEMPLATE
    text = decode_utf8(read(template), template) if template.is_file() else None
    return TokenizerFiles(path, read(path), settings, text)


def read(path: Path) -> bytes:
    """The bytes of a file; raises ConfigError if it cannot be read or has over `MAX_BYTES`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{quote_path(path)} cannot be read ({error.strerror}); correct the path or its "
            "permissions."
        ) from error
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{quote_path(path)} must have at most {MAX_BYTES:,} bytes to be the file of a "
            "tokenizer; fetch it again."
        )
    return data


def decode_utf8(data: bytes, path: Path) -> str:
    """The text of a file; raises ConfigError if it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{quote_path(path)} must be UTF-8, but byte {error.start:,} is not; fetch it again."
        ) from error


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The table of a JSON file; raises ConfigError if it is not one, or has invalid text."""
    text = decode_utf8(data, path)
    try:
        values = json.loads(text)
        # JSON can spell half of a surrogate pair. No text has it, and it makes `tokenizers` abort.
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(
            f"{quote_path(path)} is not valid JSON ({reason}); fetch it again."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{quote_path(path)} must be a table, got {quote(values)}.")
    return values


def write(path: Path, data: bytes) -> None:
    """Writes a file at once: a draft beside it, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(data)
    os.replace(draft, path)
