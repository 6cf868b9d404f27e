"""Where the file of a tokenizer is: a path, a folder, or a name of the Hugging Face hub."""

import functools
import os
from pathlib import Path

from xlstm_jax.config import user_path
from xlstm_jax.data.tokenizers import files
from xlstm_jax.errors import ConfigError, import_optional, quote, quote_path

HUB = "hf://"


def find(name: str) -> Path:
    """The tokenizer.json or sentencepiece model that a path, a folder or an hf:// name stands for.

    Raises:
        ConfigError: there is none, or several.
    """
    path = _download(name) if name.startswith(HUB) else user_path(name)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise ConfigError(f"{quote_path(path)} must be a file or a folder; correct the path.")
    if (path / files.JSON).is_file():
        return path / files.JSON
    models = sorted(path.glob("*.model"))
    if len(models) != 1:
        said = (
            f"has {len(models)} files *.model"
            if models
            else f"has neither {files.JSON} nor *.model"
        )
        raise ConfigError(f"{quote_path(path)} {said}; give the path of the file of the tokenizer.")
    return models[0]


@functools.cache  # a name is looked up on the network once
def _download(name: str) -> Path:
    """The local folder of the tokenizer files of hf://ORG/NAME."""
    purpose = f"tokenizer={quote(name)}, unlike the path of a local folder,"
    huggingface_hub = import_optional("huggingface_hub", purpose, install="huggingface_hub")
    wanted = [files.JSON, "*.model", files.CONFIG, files.SPECIAL_TOKENS, files.TEMPLATE]
    try:
        return Path(
            huggingface_hub.snapshot_download(name.removeprefix(HUB), allow_patterns=wanted)
        )
    except Exception as error:  # of the network, the hub, or the name: the types are its own
        raise ConfigError(
            f"tokenizer={quote(name)} cannot be fetched ({quote(str(error))}); check the name and "
            "the network, or give the path of a local folder."
        ) from error
