"""Mappings in YAML files: the core schema of YAML 1.2, without anchors, aliases and tags.

PyYAML implements YAML 1.1, where 1:30 is 90, `on` is true and 1e-6 is a string. Only its parser is
used here; the file is untrusted, so its size and depth are bounded.
"""

import re
from pathlib import Path
from typing import Any

from xlstm_jax.config import ConfigError
from xlstm_jax.convert.fields import check_size
from xlstm_jax.errors import import_optional, printable, quote, quote_path

MAX_BYTES = 10**5
"""PyYAML parses about 10^5 bytes in a second; published configs have less than 10^3."""

MAX_DEPTH = 20

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS: dict[str, Any] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True)
_WORDS |= dict.fromkeys(("false", "False", "FALSE"), False)


class _InvalidError(Exception):
    """The text is not a mapping that we read; the message says why."""


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: PyYAML is not installed, or the file is too long or not such a mapping.
    """
    purpose = f"reading {quote_path(path)}"
    yaml = import_optional("yaml", purpose, install="xlstm-jax[hf]", package="PyYAML")
    check_size(path, MAX_BYTES)
    try:
        parser = yaml.SafeLoader(path.read_bytes().decode("utf-8-sig"))
        parser.get_event()  # the start of the stream
        values = _document(yaml, parser)
    except (yaml.YAMLError, UnicodeDecodeError, _InvalidError) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise ConfigError(
            f"{quote_path(path)} is not valid YAML ({reason}); download it again."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{quote_path(path)} must be a mapping of fields, got {quote(values)}; download it "
            "again."
        )
    return values


def _document(yaml: Any, parser: Any) -> Any:
    if parser.check_event(yaml.StreamEndEvent):
        return None
    parser.get_event()  # the start of the document
    value = _value(yaml, parser, 0)
    parser.get_event()
    if not parser.check_event(yaml.StreamEndEvent):
        raise _InvalidError("it has several documents")
    return value


def _value(yaml: Any, parser: Any, depth: int) -> Any:
    """The value that starts at the next event of the parser."""
    event = parser.get_event()
    # An alias repeats a value: a few hundred bytes of them unfold to gigabytes.
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _InvalidError(f"it has the anchor or alias {quote(event.anchor)}; write values out")
    if event.tag is not None:
        raise _InvalidError(f"it has the tag {quote(event.tag)}; leave it out")
    if isinstance(event, yaml.ScalarEvent):
        return event.value if event.style else _scalar(event.value)
    if depth == MAX_DEPTH:
        raise _InvalidError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not parser.check_event(yaml.SequenceEndEvent):
            items.append(_value(yaml, parser, depth + 1))
        parser.get_event()
        return items
    fields: dict[str, Any] = {}
    while not parser.check_event(yaml.MappingEndEvent):
        key = _value(yaml, parser, depth + 1)
        if not isinstance(key, str) or key in fields:
            raise _InvalidError(f"the key {quote(key)} must be a string and unique")
        fields[key] = _value(yaml, parser, depth + 1)
    parser.get_event()
    return fields


def _scalar(text: str) -> Any:
    """The value of a scalar without quotation marks."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        # Of many digits, a conversion costs more than linear time, and Python refuses it.
        if len(text) > 4000:
            raise _InvalidError(f"it has an integer of {len(text)} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        # Python spells .inf and .nan without the point.
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
