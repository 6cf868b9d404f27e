"""Configs: JSON round trips, validation, fingerprints, comparison and config files."""

import dataclasses
import json
import math
import pathlib
from typing import Literal

import pytest

from xlstm_jax import config
from xlstm_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    width: int = 8
    bounds: tuple[float, float] = (3.0, 6.0)

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}; make it positive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    layer: Layer = Layer()
    extra: Layer | None = None
    warmup: int | float = 0.5
    limit: float | None = None
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    folder: pathlib.Path = pathlib.Path("x")
    flag: bool = False


FULL = Model(name="n", extra=Layer(width=3), warmup=7, limit=1.5, kind="b", sizes=(1, 2), flag=True)


@pytest.mark.parametrize("cfg", [Model(name="n"), FULL], ids=["defaults", "full"])
def test_config_round_trips_through_json(cfg):
    text = json.dumps(config.to_dict(cfg))
    assert config.from_dict(Model, json.loads(text)) == cfg


def test_int_is_accepted_as_float_and_has_the_same_fingerprint():
    cfg = config.from_dict(Model, {"name": "n", "limit": 2})
    assert type(cfg.limit) is float
    assert config.fingerprint(cfg) == config.fingerprint(dataclasses.replace(cfg, limit=2.0))


def test_fingerprint_depends_on_the_values_alone():
    assert len(config.fingerprint(FULL)) == 12
    assert config.fingerprint(FULL) == config.fingerprint(dataclasses.replace(FULL))
    assert config.fingerprint(FULL) != config.fingerprint(Model(name="n"))
    assert config.fingerprint(Model(name="n", limit=math.inf))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "n", "layre": {}}, ["layre", "Model", "layer"]),
        ({"name": "n", "layer": {"widht": 1}}, ["layer.widht", "Layer", "width"]),
        ({"name": "n", "layer": {"width": 0}}, ["width", "0", "at least 1"]),
        ({"name": "n", "layer": {"width": "8"}}, ["layer.width", "'8'", "int"]),
        ({"name": "n", "layer": {"bounds": [1.0]}}, ["layer.bounds", "2 values", "1"]),
        ({"name": "n", "layer": 3}, ["layer", "table", "3"]),
        ({"name": "n", "kind": "c"}, ["kind", "'a', 'b'", "'c'"]),
        ({"name": "n", "limit": "low"}, ["limit", "float or None", "'low'"]),
        ({"name": "n", "sizes": [1, True]}, ["sizes[1]", "int", "True"]),
        ({"name": "n", "flag": 1}, ["flag", "bool", "1"]),
        ({"name": "n", "extra": {"depth": 1}}, ["extra.depth", "Layer"]),
        ({}, ["name", "no default"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_values_raise_a_one_line_error(values, words):
    with pytest.raises(ConfigError) as caught:
        config.from_dict(Model, values)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


def test_differences_list_the_fields_with_both_values():
    new, stored = config.to_dict(FULL), config.to_dict(dataclasses.replace(FULL, warmup=9))
    del stored["kind"]
    assert config.differences(new, stored) == [
        "warmup: 7, stored 9",
        "kind: 'b', stored absent",
    ]
    assert config.differences(new, new) == []


def test_differences_list_the_fields_of_a_missing_dataclass():
    new, stored = config.to_dict(FULL), config.to_dict(dataclasses.replace(FULL, extra=None))
    lines = config.differences(new, stored)
    assert lines[0] == "extra.width: 3, stored absent"
    assert lines[-1] == "extra: absent, stored None"


SOURCE = """
import dataclasses

@dataclasses.dataclass
class Local:
    x: "int" = 1

def config(size="cpu"):
    from xlstm_jax.config import ConfigError
    from tests.test_config import Layer
    if size == "bad":
        raise ValueError("size='bad' is not known; use cpu.")
    return Layer(width=3 if size == "cpu" else 4)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1]))

    def _write(text, name="c.py"):
        (tmp_path / name).write_text(text.replace("tests.test_config", __name__))
        return tmp_path / name

    return _write


def test_load_config_runs_a_python_file(write):
    path = write(SOURCE)
    assert config.load_config(path, Layer) == Layer(width=3)
    assert config.load_config(path, Layer, size="paper") == Layer(width=4)


def test_load_config_accepts_a_run_directory(write):
    path = write(json.dumps(config.to_dict(FULL)), "config.json")
    assert config.load_config(path, Model) == config.load_config(path.parent, Model) == FULL


@pytest.mark.parametrize(
    ("name", "text", "size", "words"),
    [
        ("c.py", "x = (", None, ["c.py", "line 1"]),
        ("c.py", "x = 1", None, ["config(size=...)"]),
        ("c.py", "def config(): return 3", None, ["return Layer", "int"]),
        ("c.py", "def config(): return 3", "cpu", ["'cpu'", "takes no size"]),
        ("c.py", SOURCE, "bad", ["size='bad'"]),
        ("config.json", "{", None, ["not valid JSON"]),
        ("config.json", "{}", "cpu", ["'cpu'", "leave it out"]),
        ("c.txt", "", None, ["c.txt", ".py"]),
    ],
)
def test_invalid_config_file_raises_a_one_line_error(write, name, text, size, words):
    with pytest.raises(ConfigError) as caught:
        config.load_config(write(text, name), Layer, size=size)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_config_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        config.load_config(tmp_path / "none.py", Layer)
    with pytest.raises(ConfigError, match="config.json does not exist"):
        config.load_config(tmp_path, Layer)
