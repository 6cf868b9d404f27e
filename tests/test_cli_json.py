"""`--json` prints one JSON object with the figures that are printed otherwise."""

import json

import pytest

from tests.test_cli import CONFIG, workdir  # noqa: F401
from xlstm_jax.cli import console, main
from xlstm_jax.data.shards.manifest import TokenizerInfo

pytestmark = pytest.mark.usefixtures("workdir")


def result_of(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_describe(capsys):
    figures = result_of(capsys, "describe", CONFIG, "--size", "smoke")
    assert main(["describe", CONFIG, "--size", "smoke"]) == 0
    text = capsys.readouterr().out
    assert f"{figures['num_params']:,}" in text and f"{figures['total_tokens']:,}" in text
    shapes = {p["name"]: p["shape"] for p in figures["parameters"]}
    assert shapes["token_embedding/embedding"] == [257, 32]
    assert figures["memory_bytes"]["parameters"] == 4 * figures["num_params"]


@pytest.mark.slow
def test_plan(capsys):
    figures = result_of(capsys, "plan", CONFIG, "--size", "smoke", "--data.batch-size", "16")
    assert figures["topology"] == "v5e:4x4" and figures["fits"] is True


def test_data_inspect(capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n')
    figures = result_of(capsys, "data", "inspect", str(tmp_path), "--split", "train")
    assert figures["kind"] == "raw" and figures["tokenizer"] is None
    split = figures["splits"]["train"]
    assert split["documents"] == sum(count for _, _, count in split["histogram"])
    assert split["bytes"] == split["lengths"]["mean"] * split["documents"]


def test_values_that_json_does_not_have(capsys):
    info = TokenizerInfo(name="byte", sha256="0", vocab_size=257, eos_id=256)
    console.print_json({"nan": float("nan"), "info": info, 1: (float("inf"), [2])})
    assert json.loads(capsys.readouterr().out) == {
        "nan": None,
        "info": {"name": "byte", "sha256": "0", "vocab_size": 257, "eos_id": 256},
        "1": [None, [2]],
    }
