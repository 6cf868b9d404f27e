"""Checkpoint folders on the Hugging Face hub.

Only the config, safetensors files, tokenizer, license and model card are downloaded, the small ones
first, so that an unsupported model is rejected before its weights are downloaded.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from xlstm_jax import hub
from xlstm_jax.config import user_path
from xlstm_jax.convert import families, tensors
from xlstm_jax.convert.fields import CONFIG, read_config
from xlstm_jax.data.tokenizers import locate
from xlstm_jax.errors import ConfigError, NetworkError

SMALL_FILES = (CONFIG, tensors.INDEX, *locate.FILES, "README.md")
SMALL_FILES += ("WEIGHTS_LICEN[CS]E.txt", "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*")
"""Patterns of the names of files that belong to a model, besides those of its weights."""


def find(source: str | Path) -> Path:
    """The folder of transformers, or the run, that a source names; downloaded if it is hf://.

    A path need not exist. Raises as `fetch`.
    """
    return fetch(str(source)) if hub.is_address(source) else user_path(source)


@functools.cache  # a branch that moves meanwhile does not mix two commits in one process
def fetch(address: str) -> Path:
    """Downloads what `load_hf` reads from hf://ORG/NAME or hf://ORG/NAME@REVISION.

    Returns:
        The folder in the client's cache; its name is the commit.

    Raises:
        ConfigError: the address is malformed, names nothing that can be read, or a model that is
            not supported or has no safetensors files.
        NetworkError: the hub cannot be reached.
        WeightsError: the index of the weights is corrupt, or names files that do not exist.
    """
    source = hub.parse(address)
    folder = hub.download(source, SMALL_FILES)
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{source} must have a {CONFIG}, but has none; name a repository with a model that "
            "save_pretrained of transformers wrote."
        )
    model_type = read_config(folder).get("model_type", "xlstm")
    families.of_type(model_type, f"{CONFIG} of {source}")
    at_commit = source._replace(revision=folder.name)
    return hub.download(at_commit, _weights(source, folder, _names(at_commit, folder)))


def _names(source: hub.Address, folder: Path) -> list[str]:
    """The names of the files of a repository, or of those in the cache without a network."""
    try:
        return hub.list_files(source)
    except NetworkError:
        names = [path.name for path in folder.iterdir()]
        if (folder / tensors.INDEX).is_file() or any(n.endswith(".safetensors") for n in names):
            return names
        raise


def _weights(source: hub.Address, folder: Path, names: Sequence[str]) -> list[str]:
    """The names of the files with the weights, chosen as `tensors.from_folder` does."""
    if tensors.SINGLE in names:
        return [tensors.SINGLE]
    if tensors.INDEX in names:
        shards = tensors.names_in(folder / tensors.INDEX)
        if missing := [name for name in shards if name not in names]:
            raise tensors.lacks(str(source), missing, len(shards))
        return shards
    # Those in subfolders are of other formats, or of variants of the model.
    if weights := [name for name in names if tensors.is_weights(name)]:
        return weights
    raise tensors.no_weights(str(source), names)
