"""Checkpoint folders to the Hugging Face hub."""

import fnmatch
from pathlib import Path

from xlstm_jax import hub
from xlstm_jax.config import user_path
from xlstm_jax.convert import card, hf, license, remote, tensors
from xlstm_jax.errors import ConfigError


def push_hf(address: str, folder: str | Path, *, private: bool = True) -> hub.Pushed:
    """Uploads a checkpoint folder, such as one of `save_hf`, to hf://ORG/NAME in one commit.

    The repository is created if it does not exist. Uploaded are the config, weights, tokenizer,
    license and model card; a card (README.md) is written for a folder without one. Weights of an
    earlier upload that the folder lacks are deleted. The client's token needs write access.

    Args:
        private: of a repository that is created; an existing one stays as it is.

    Returns:
        The address of the commit, and whether the repository is private.

    Raises:
        ConfigError: the address is malformed or has a revision, the folder has no model that
            `load_hf` reads, or access is denied.
        WeightsError: a file of the weights is missing or corrupt.
        NetworkError: the hub cannot be reached.
    """
    target, folder = destination(address), user_path(folder)
    cfg, _ = hf.open_folder(folder)
    weights = tensors.files_of(folder)
    small = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch.fnmatch(path.name, p) for p in remote.SMALL_FILES)
    ]
    files: dict[str, Path | bytes] = {path.name: path for path in [*small, *weights]}
    if weights[0].name == tensors.SINGLE:
        files.pop(tensors.INDEX, None)  # of other files, which are not read
    if license.CARD not in files:
        line = license.find(folder)
        text = card.model_card(target.repository, cfg, folder, license_line=line)
        files[license.CARD] = text.encode()
    return hub.push(target, files, replaces=tensors.is_weights, private=private)


def destination(address: str) -> hub.Address:
    """The repository to push to; raises ConfigError if the address has a revision."""
    target = hub.parse(address)
    if target.revision is not None:
        raise ConfigError(
            f"{address} must have no revision to be written to; leave out @{target.revision}."
        )
    return target
