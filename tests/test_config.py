"""Configs: JSON round trips, validation, fingerprints, comparison and config files."""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Literal

import numpy as np
import pytest

from xlstm_jax import config
from xlstm_jax.config import ConfigError, user_code


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
    # Else configs of later tests record the modules that a test imports.
    monkeypatch.setattr(user_code, "imported", {})

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


# Name -> text of c.py, and part of its error. beside.py fails in its first function.
USER_ERRORS = {
    "division": ("\n\nx = 1 / 0", "c.py:3: ZeroDivisionError: division by zero"),
    "in config": ("def config():\n    return {}['a']", "c.py:2: KeyError: 'a'"),
    "undefined": ("def config():\n    return nothing", "c.py:2: NameError: name 'nothing'"),
    "exit": ("import sys\nsys.exit(3)", "c.py:2: SystemExit: 3"),
    "no message": ("raise OSError", "c.py:1: OSError"),
    "value": ("def config(size=1):\n    raise ValueError('a\\nb')", "c.py:2: ValueError: a b"),
    "syntax": ("x = (", "c.py:1: SyntaxError: '(' was never closed"),
    "null byte": ("x = 1\0", "c.py"),
    "beside": ("import beside\n\nbeside.fail()", "beside.py:2: RuntimeError: no"),
    "beside syntax": ("import beside_syntax", "beside_syntax.py:2: SyntaxError: invalid syntax"),
    "absent": ("import missing_module", "c.py:1: ModuleNotFoundError: No module named"),
    "library": ("import json\n\njson.loads('{')", "c.py:3: JSONDecodeError: Expecting"),
    "our error": (
        "from xlstm_jax.train import TrainConfig\nTrainConfig(steps=0)",
        "c.py:2: train.steps must be at least 1, got 0",
    ),
    "misspelled": (
        f"from {__name__} import Model\nModel(name='n', limits=1)",
        "unexpected keyword argument 'limits'; did you mean limit?",
    ),
    "misspelled below": (
        f"from {__name__} import Layer\n\n\nLayer(widht=1)",
        "c.py:4: TypeError: Layer.__init__() got an unexpected keyword argument 'widht'; did you "
        "mean width?",
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_error_in_a_config_file_is_one_line_with_its_location(write, case, monkeypatch, tmp_path):
    text, expected = USER_ERRORS[case]
    monkeypatch.chdir(tmp_path)
    write("def fail():\n    raise RuntimeError('no')\n", "beside.py")
    write("x = 0\nx = = 1\n", "beside_syntax.py")
    with pytest.raises(ConfigError) as caught:
        config.load_config(write(text), Model)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    sys.modules.pop("beside", None)


def test_error_in_an_imported_module_is_one_line_with_its_location(write):
    with pytest.raises(ConfigError, match=r"^\S*bad_module\.py:2: ZeroDivisionError: division"):
        config.import_module(str(write("x = 0\ny = 1 / x\n", "bad_module.py")))
    for name in ("..", "a\0b", "~nobody-of-this-name/x.py"):
        with pytest.raises(ConfigError):
            config.import_module(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    count: int = 1
    rate: float = 0.5
    steps: int | float = 0
    bounds: tuple[float, float] = (1.0, 2.0)
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    flag: bool = False

    def __post_init__(self):
        config.check_fields(self, "part.", {"at least 1": "count", "above 0": "rate limit"})


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(count="16"), "part.count must be int, got '16'."),
        (dict(count=1e1), "part.count must be int, got 10.0."),
        (dict(count=True), "part.count must be int, got True."),
        (dict(count=0), "part.count must be at least 1, got 0; the default is 1."),
        (dict(count=2**31), "part.count must be at most 2147483647, got 2147483648"),
        (dict(count=10**400), "part.count must be at most 2147483647, got an integer of 1329 bits"),
        (dict(rate="x" * 10**6), "part.rate must be float, got 'xxx"),
        (dict(rate=10**400), "part.rate must be float, got an integer of 1329 bits."),
        (dict(rate=math.nan), "part.rate must be 0 or a number from 1.2e-38 to 3.4e+38"),
        (dict(rate=math.inf), "got inf."),
        (dict(rate=1e-46), "got 1e-46."),
        (dict(rate=1e39), "got 1e+39."),
        (dict(rate=np.float64(math.nan)), "got nan."),
        (dict(steps=math.inf), "part.steps must be"),
        (dict(steps=-(10**400)), "part.steps must have at most 512 bits, got an integer of 1329"),
        (dict(steps=None), "part.steps must be int or float, got None."),
        (dict(bounds=(1.0, math.nan)), "part.bounds"),
        (dict(bounds=1.0), "part.bounds must be"),
        (dict(kind=np.dtype("float32")), "part.kind must be one of 'a', 'b', got dtype"),
        (dict(kind=["a"]), "part.kind must be one of 'a', 'b', got ['a']"),
        (dict(limit=-1), "part.limit must be above 0, got -1"),
        (dict(flag=1), "part.flag must be bool, got 1."),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_types_and_ranges_are_checked_when_a_config_is_built(fields, words):
    with pytest.raises(ConfigError) as caught:
        Checked(**fields)
    message = str(caught.value)
    assert words in message and len(message) < 250 and message.endswith(".")


@pytest.mark.usefixtures("unchecked_types")
def test_numpy_numbers_and_lists_become_the_types_of_the_fields():
    cfg = Checked(
        count=np.int64(2),
        rate=np.float32(0.25),
        steps=np.int32(3),
        bounds=[np.float64(1), 2],
        flag=np.bool_(True),
        limit=np.asarray(1.5),
    )
    expected = Checked(count=2, rate=0.25, steps=3, limit=1.5, flag=True)
    assert cfg == expected and hash(cfg) == hash(expected)
    assert json.dumps(config.to_dict(cfg)) == json.dumps(config.to_dict(expected))
    assert [type(x) for x in (cfg.count, cfg.rate, cfg.steps)] == [int, float, int]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "is not valid JSON (nested too deeply)"),
        (b'{"name": ' + b"9" * 5000 + b"}", "is not valid JSON (Exceeds the limit"),
        (b'{"name": "caf\xe9"}', "is not valid JSON ('utf-8' codec can't decode"),
        (b'{"name": "n", "limit": ' + b"9" * 401 + b"}", "limit must be float or None, got an int"),
        (b'{"name": "n", "limit": NaN}', "limit must be 0 or a number from"),
        (b'{"name": "n", "imports": 5, "x": 1}', "x is not a field of Model"),
        (b'{"name": "n", "imports": ["m" , 3], "x": 1}', "needs --import m --import 3"),
        (b"[]", "Model must be a table of fields, got []"),
        (b"5", "got 5"),
        (b"null", "got None"),
        (b'"x"', "got 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_json_raises_a_one_line_error(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json") as caught:
        config.load_config(tmp_path, Model)
    assert words in str(caught.value) and len(str(caught.value)) < 500


def test_a_home_directory_is_replaced_in_paths(write, monkeypatch):
    path = write("from tests.test_config import Layer\ndef config(): return Layer()")
    monkeypatch.setenv("HOME", str(path.parent))
    assert config.load_config("~/c.py", Layer) == Layer()
    with pytest.raises(ConfigError, match="names a home directory that does not exist"):
        config.load_config("~nobody-of-this-name/c.py", Layer)
