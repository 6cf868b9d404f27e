"""Finding the file of a tokenizer, by path, folder, or name on the Hugging Face hub."""

import functools
import os
import shutil
from pathlib import Path

from xlstm_jax import hub
from xlstm_jax.config import user_path
from xlstm_jax.data.tokenizers import files
from xlstm_jax.errors import ConfigError, quote_path

FILES = (files.JSON, "*.model", files.CONFIG, files.SPECIAL_TOKENS, files.TEMPLATE)
"""Patterns of the names of the files of a tokenizer."""


def find(name: str) -> Path:
    """The tokenizer.json or sentencepiece model that a path, a folder or an hf:// name stands for.

    Raises:
        ConfigError: it does not exist, or is ambiguous.
        NetworkError: the hub cannot be reached.
    """
    path = _download(name) if hub.is_address(name) else user_path(name)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise ConfigError(f"{quote_path(path)} must be a file or a folder; correct the path.")
    if (path / files.JSON).is_file():
        return path / files.JSON
    models = sorted(path.glob("*.model"))
    if len(models) != 1:
        problem = (
            f"has {len(models)} files *.model"
            if models
            else f"has neither {files.JSON} nor *.model"
        )
        raise ConfigError(
            f"{quote_path(path)} {problem}; give the path of the file of the tokenizer."
        )
    return models[0]


@functools.cache  # a name is looked up on the network once
def _download(name: str) -> Path:
    """The local folder of the tokenizer files of hf://ORG/NAME or hf://ORG/NAME@REVISION."""
    return hub.download(hub.parse(name), FILES)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the file of a tokenizer."""
    return (folder / files.JSON).is_file() or any(folder.glob("*.model"))


def copy_files(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer between folders, of which the second may be new."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)
