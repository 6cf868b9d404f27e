"""The Hugging Face hub: addresses, downloads and uploads, by the client `huggingface_hub`.

The client honors HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. Files are only stored: nothing
that is downloaded is executed or unpickled.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_jax.errors import ConfigError, NetworkError, import_optional, quote, quote_path

PREFIX = "hf://"
_URL = re.compile(r"hf:|https?:", re.IGNORECASE)
_ADDRESS = re.compile(r"hf://([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w.+/-]{1,255}))?", re.ASCII)

# Of the local disk; other errors of the operating system are those of a connection.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOTDIR)

_BUSY = (408, 425, 429)  # statuses below 500 after which the same request may succeed


class Address(NamedTuple):
    """A repository of models, at a revision."""

    repository: str  # ORG/NAME
    revision: str | None = None  # a branch, a tag or a commit; None: the default branch

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_address(source: str | Path) -> bool:
    """Whether a source is an address of the hub rather than a path; it need not be valid.

    Misspelled addresses and other URLs are, so that `parse` rejects them: no path begins like them.
    """
    return _URL.match(str(source)) is not None


def parse(address: str) -> Address:
    """The parts of hf://ORG/NAME or hf://ORG/NAME@REVISION; raises ConfigError if it is neither."""
    match = _ADDRESS.fullmatch(address)
    if match is None or ".." in address or "--" in match[1]:
        raise ConfigError(
            f"{quote(address)} must be hf://ORG/NAME or hf://ORG/NAME@REVISION, with letters, "
            "digits, '-', '_' and '.' in names; correct it, or write ./ before a path."
        )
    return Address(match[1], match[2])


def download(address: Address, patterns: Sequence[str]) -> Path:
    """Downloads the files of a repository whose names match one of the `patterns`.

    Returns:
        Their folder in the client's cache, whose name is the commit. Files that are cached are not
        downloaded again; without a network, it has those of an earlier download.

    Raises:
        ConfigError: the repository or the revision does not exist, or access is denied.
        NetworkError: the hub cannot be reached, or a download was interrupted.
    """
    client = _client(address)
    with _client_errors(client, address):
        folder = client.snapshot_download(
            address.repository, revision=address.revision, allow_patterns=list(patterns)
        )
    return Path(folder)


def list_files(address: Address) -> list[str]:
    """The names of all files of a repository; raises as `download`."""
    client = _client(address)
    with _client_errors(client, address):
        # Not `list_repo_files`, which tries for half a minute without a network.
        info = client.HfApi().model_info(address.repository, revision=address.revision)
    return [file.rfilename for file in info.siblings or ()]


class Pushed(NamedTuple):
    """What a push made."""

    address: str  # hf://ORG/NAME@COMMIT
    private: bool


def check_login(address: Address) -> None:
    """Raises ConfigError unless the client has a valid token, or NetworkError."""
    client = _client(address)
    with _client_errors(client, address):
        client.HfApi().whoami()


def push(
    address: Address,
    files: Mapping[str, Path | bytes],
    *,
    replaces: Callable[[str], bool],
    private: bool,
) -> Pushed:
    """Commits files to the default branch of a repository, which is created if it does not exist.

    Args:
        files: name in the repository -> a local file, or its contents.
        replaces: names of existing files that are deleted if `files` lacks them.
        private: of a repository that is created.

    Raises:
        ConfigError: the client has no token, or none with write access.
        NetworkError: the hub cannot be reached.
    """
    client = _client(address)
    with _client_errors(client, address):
        api, repository = client.HfApi(), address.repository
        api.create_repo(repository, private=private, exist_ok=True)
        info = api.model_info(repository)
        stale = {file.rfilename for file in info.siblings or ()} - files.keys()
        operations = [client.CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [client.CommitOperationDelete(name) for name in stale if replaces(name)]
        commit = api.create_commit(repository, operations, commit_message="Upload model")
    return Pushed(str(address._replace(revision=commit.oid)), bool(info.private))


def _client(address: Address) -> Any:
    import_optional("huggingface_hub.errors", str(address), install="xlstm-jax[hub]")
    return import_optional("huggingface_hub", str(address), install="xlstm-jax[hub]")


@contextlib.contextmanager
def _client_errors(client: Any, address: Address) -> Iterator[None]:
    """Converts the errors of the client to those of `download`."""
    try:
        yield
    except client.errors.HFValidationError as error:
        raise ConfigError(
            f"{address} must have a name that the hub allows ({_reason(error)}); correct it."
        ) from error
    except client.errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{address} must have a revision that exists, got {quote(address.revision)}; use a "
            "branch, a tag or a commit of the repository, or leave it out."
        ) from error
    except client.errors.GatedRepoError as error:
        raise ConfigError(
            f"{address} may be read only by those who accepted its terms; accept them on its "
            "page, and set HF_TOKEN to a token of that account."
        ) from error
    except client.errors.LocalTokenNotFoundError as error:
        raise ConfigError(
            f"{address} can be written to with a token only; set HF_TOKEN to one with write access."
        ) from error
    except Exception as error:  # whatever its transport raises: the library varies by version
        _raise_by_status(client, address, error)


def _raise_by_status(client: Any, address: Address, error: Exception) -> None:
    """Raises ConfigError for a request that the hub rejects, else NetworkError."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        raise error  # names its path
    causes = list(_causes(error))
    if any(isinstance(cause, client.errors.OfflineModeIsEnabled) for cause in causes):
        raise NetworkError(
            f"{address} needs the hub, which HF_HUB_OFFLINE forbids to reach; unset it, or set "
            "HF_HOME to a cache that has the model."
        ) from error
    # Errors of downloads and uploads are wrapped in others without the response of the hub.
    failed = next((cause for cause in causes if hasattr(cause, "response")), causes[-1])
    status = getattr(getattr(failed, "response", None), "status_code", None)
    if status in (401, 403, 404):
        raise ConfigError(
            f"{address} does not exist, or access is denied (status {status}); check the name, "
            "and set HF_TOKEN to a token with access to it."
        ) from error
    is_rejected = status is not None and 400 <= status < 500 and status not in _BUSY
    if is_rejected or (status is None and isinstance(error, ValueError)):
        raise ConfigError(
            f"{address}: the hub or its client rejects the request ({_reason(failed)}); correct it."
        ) from error
    raise NetworkError(
        f"{address} cannot be reached, or the transfer was interrupted ({_reason(failed)}); check "
        "the network and repeat the command: complete files are retained."
    ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    """The type and the beginning of the message of an error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {quote_path(text[:200])}"
