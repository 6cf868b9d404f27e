"""Verdicts of `xlstm-jax check` on this device; "auto" respects them.

CACHE/checks.json  {hash of device, driver and versions: {"device": ..., "verdicts": ...}}
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

import jax

import pallas_kernels
from pallas_kernels import common
from xlstm_jax.config.files import cache_dir

FILE = "checks.json"

UNPROVEN = {"mosaic_gpu": "triton"}
"""Implementations that "auto" selects only if they passed the check and were the fastest."""

_PACKAGES = ("jax", "jaxlib", "triton", "jax-triton", "libtpu", "xlstm-jax")


def refusal(op: str, implementation: str) -> str | None:
    """Why "auto" does not select an implementation on the current device, or None."""
    # A target of ahead-of-time compilation has no verdicts.
    known = _verdicts() if common.target() is None else {}
    verdict = known.get(op, {}).get(implementation)
    if verdict is not None and not verdict["passed"]:
        return f"it failed `xlstm-jax check` on this device ({verdict['reason']})"
    if implementation in UNPROVEN and not (verdict or {}).get("fastest"):
        other = UNPROVEN[implementation]
        return (
            f"auto selects it only where it passed `xlstm-jax check` and is faster than {other!r}"
        )
    return None


def record(verdicts: dict[str, Any]) -> pathlib.Path | None:
    """Stores op -> implementation -> verdict for the current device; None without a cache folder.

    A verdict has `passed`, `reason` and `fastest`.
    """
    path = _path()
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = _stored() | {_key(): {"device": describe(), "verdicts": verdicts}}
    draft = path.with_suffix(f".{os.getpid()}")  # another process may read or write the file
    draft.write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(draft, path)
    _verdicts.cache_clear()
    return path


def describe() -> dict[str, str]:
    """The device, its driver, and the versions on which verdicts depend."""
    device = jax.devices()[0]
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = " ".join(device.client.platform_version.split())
    source = hashlib.sha256()
    for path in sorted(pathlib.Path(pallas_kernels.__path__[0]).rglob("*.py")):
        source.update(path.read_bytes())
    return {
        "device": device.device_kind,
        "driver": driver,
        **versions,
        "kernels": source.hexdigest()[:12],
    }


@functools.cache
def _verdicts() -> dict[str, Any]:
    """Verdicts on the current device; {} if there are none."""
    stored = _stored()
    return stored.get(_key(), {}).get("verdicts", {}) if stored else {}


def _stored() -> dict[str, Any]:
    path = _path()
    try:
        stored = json.loads(path.read_text()) if path is not None and path.exists() else {}
    except (OSError, ValueError):  # unreadable or corrupt: no verdicts
        return {}
    return stored if isinstance(stored, dict) else {}


def _path() -> pathlib.Path | None:
    folder = cache_dir()
    return None if folder is None else folder / FILE


def _key() -> str:
    return hashlib.sha256(json.dumps(describe()).encode()).hexdigest()[:16]
