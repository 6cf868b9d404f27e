"""Files of arrays in which every altered byte is detected: safetensors with checksums.

The metadata in the header has two entries: `xlstm_jax`, a JSON object ("the record") that includes
the SHA-256 of every array, and `header_sha256`, that of the header with zeros instead of itself.
Nothing in a file is executed by reading it.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_jax.errors import ConfigError, import_optional, printable, quote, quote_path

FORMAT = 1
"""Version of the format. Files of a later one are refused."""

_RECORD, _ARRAYS = "xlstm_jax", "sha256"
_DIGEST = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
_UNSET = b"0" * 64


def write(
    path: Path, kind: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes a file atomically.

    Args:
        kind: what the file is, such as "session".
        record: JSON values, except the keys `format`, `kind` and `sha256`.

    Raises:
        OSError, ConfigError: the file cannot be written, or safetensors is not installed.
    """
    safetensors = _safetensors(kind)
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    checksums = {name: _sha256(array) for name, array in arrays.items()}
    record = {**record, "format": FORMAT, "kind": kind, _ARRAYS: checksums}
    metadata = {_RECORD: json.dumps(record), "header_sha256": _UNSET.decode()}
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process only
    try:
        draft.touch()  # an invalid path raises an OSError here; safetensors has its own error
        mode = draft.stat().st_mode
        safetensors.numpy.save_file(arrays, draft, metadata=metadata)
        draft.chmod(mode)  # the default; safetensors makes the file private to the owner
        _set_digest(draft)
        os.replace(draft, path)
    except safetensors.SafetensorError as error:
        # Its error for a full disk or a failed write, which has no errno.
        reason = re.search(r"\(os error (\d+)\)", str(error))
        number = int(reason[1]) if reason else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of a file, after checking both.

    Raises:
        OSError: the file cannot be opened.
        ConfigError: the file is damaged, of another kind or of a later format, or safetensors is
            not installed.
    """
    safetensors = _safetensors(kind)
    # The digest comes first, so that no parser sees an altered header.
    _check_header(path, kind)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            record = json.loads(file.metadata()[_RECORD])
            _check_kind(path, kind, record)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksums = dict(record[_ARRAYS])
    except ConfigError:
        raise
    except safetensors.SafetensorError as error:
        raise _damaged(path, kind, printable(str(error))[:200]) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # written by something else
        raise _damaged(path, kind, "its record is incomplete") from error
    for name in {**arrays, **checksums}:
        if name not in arrays or checksums.get(name) != _sha256(arrays[name]):
            raise _damaged(path, kind, f"the checksum of {quote(name)} differs")
    return record, arrays


def _safetensors(kind: str) -> Any:
    extra = "xlstm-jax[export]" if kind == "model" else "xlstm-jax[hf]"
    import_optional("safetensors.numpy", f"a {kind} file", install=extra)
    import safetensors

    return safetensors


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()


def _header(file: Any, size: int) -> bytes:
    """The length of the header and the header, as far as the file has them."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), size))


def _set_digest(path: Path) -> None:
    """Replaces the zeros of a new file."""
    with path.open("rb+") as file:
        header = _header(file, path.stat().st_size)
        match = _DIGEST.search(header)
        assert match is not None and match[1] == _UNSET
        file.seek(match.start(1))
        file.write(hashlib.sha256(header).hexdigest().encode())


def _check_header(path: Path, kind: str) -> None:
    with path.open("rb") as file:
        header = _header(file, path.stat().st_size)
    match = _DIGEST.search(header)
    if match is None:
        raise _damaged(path, kind, "its header has no checksum")
    unset = header[: match.start(1)] + _UNSET + header[match.end(1) :]
    if hashlib.sha256(unset).hexdigest().encode() != match[1]:
        raise _damaged(path, kind, "the checksum of its header differs")


def _check_kind(path: Path, kind: str, record: Mapping[str, Any]) -> None:
    if record["kind"] != kind:
        raise ConfigError(
            f"{quote_path(path)} must be a {kind} file, got a {quote(record['kind'])} file; pass "
            "another path."
        )
    if record["format"] > FORMAT:
        raise ConfigError(
            f"{quote_path(path)} must have a format up to {FORMAT}, got {quote(record['format'])}, "
            "which a newer version of xlstm-jax writes; upgrade xlstm-jax."
        )


def _damaged(path: Path, kind: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{quote_path(path)} must be an unaltered {kind} file, but {reason}; restore it, or write "
        "it again."
    )
