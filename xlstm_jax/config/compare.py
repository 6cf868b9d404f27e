"""Fingerprints of configs, and the fields in which two of them differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from xlstm_jax.config.fields import to_dict
from xlstm_jax.errors import quote


def fingerprint(cfg: Any) -> str:
    """A hash of the values of a config: twelve hexadecimal digits; 1 and 1.0 are equal."""

    # A float field may hold an int, which JSON writes without ".0".
    def number(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    values = json.loads(json.dumps(to_dict(cfg)), parse_float=number)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(new: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """The fields that differ from those of an earlier run: "train.lr: 0.001, stored 0.003"."""
    new, stored = flatten(new), flatten(stored)
    lines = []
    # Keys are compared, not only values: None and an absent field are different.
    for path in dict.fromkeys((*new, *stored)):
        if path not in new or path not in stored or new[path] != stored[path]:
            left, right = (quote(x[path]) if path in x else "absent" for x in (new, stored))
            lines.append(f"{path}: {left}, stored {right}")
    return lines


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names: {"train": {"lr": 1}} becomes {"train.lr": 1}."""
    flat = {}
    for name, value in values.items():
        # An empty mapping stays a value, otherwise it would vanish from comparisons.
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
