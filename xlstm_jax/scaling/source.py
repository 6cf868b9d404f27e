"""A fingerprint of the source of this library: results of different sources must not be mixed."""

import functools
import hashlib
from pathlib import Path

import pallas_kernels
import xlstm_jax


@functools.cache
def source_fingerprint() -> str:
    """A hash of the Python and JSON files of both packages: twelve hexadecimal digits."""
    digest = hashlib.sha256()
    for package in (xlstm_jax, pallas_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
