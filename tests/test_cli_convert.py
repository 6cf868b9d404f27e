"""`xlstm-jax convert` and `describe` on published models."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments.char_lm import SMOKE
from tests.golden_files import FOLDER
from tests.test_cli import error_of, workdir  # noqa: F401
from xlstm_jax import config, convert
from xlstm_jax.cli import main
from xlstm_jax.convert import compare, license
from xlstm_jax.modules import LM, LargeConfig, LMConfig, param_shapes
from xlstm_jax.train import ExperimentConfig, checkpoint, fit, restore_params

HF = FOLDER / "hf_tiny"


def assert_same_trees(a, b):
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))


def test_hf_to_run_imports_config_and_parameters(workdir, capsys):  # noqa: F811
    assert main(["convert", "hf-to-run", str(HF), "run"]) == 0
    out = capsys.readouterr().out
    assert "427,912" in out
    assert license.UNKNOWN in out and "logits" not in out
    cfg, params = restore_params("run")
    model, expected = convert.load_hf(HF)
    assert cfg.model == model and cfg.name == "run"
    assert_same_trees(params, expected)


def test_run_to_hf_inverts_hf_to_run(workdir, capsys):  # noqa: F811
    source = shutil.copytree(HF, workdir / "hf", copy_function=shutil.copyfile)
    card = "---\nlicense: other\nlicense_name: 'some-terms'  # ask\n---\nWeights.\n"
    (source / "README.md").write_text(card)
    (source / "licence.md").write_text("The terms.\nAll of them.\n")
    (source / "LICENSES").mkdir()
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"eos_token_id": 7}))
    assert main(["convert", "hf-to-run", "hf", "run"]) == 0
    assert main(["convert", "run-to-hf", "run", "out"]) == 0
    assert capsys.readouterr().out.count("other, some-terms (README.md)") == 2
    assert license.find("out") == "other, some-terms (README.md)"
    license_text = (workdir / "out" / license.FILE).read_text()
    assert license_text == "other, some-terms (README.md)\n\nThe terms.\nAll of them.\n"
    assert json.loads((workdir / "out" / "config.json").read_text())["eos_token_id"] == 7
    a, b = convert.load_hf("hf"), convert.load_hf("out")
    assert a[0] == b[0]
    assert_same_trees(a[1], b[1])


def test_a_baseline_becomes_a_run_and_the_same_folder_again(workdir):  # noqa: F811
    source = FOLDER / "mamba_tiny"
    assert main(["convert", "hf-to-run", str(source), "run"]) == 0
    assert main(["convert", "run-to-hf", "run", "out"]) == 0
    a, b = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (source, workdir / "out")
    )
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_license_file_is_used_if_the_model_card_names_none(tmp_path):
    assert license.find(tmp_path) == license.UNKNOWN
    (tmp_path / "LICENSE").write_text("\n  Some Community License\n\nterms\n")
    assert license.find(tmp_path) == "Some Community License (LICENSE)"
    (tmp_path / license.OLD_FILE).write_text("terms of the source\n\nAll of them.\n")
    assert license.find(tmp_path) == "terms of the source"


TINY = LMConfig(
    vocab_size=257,
    dim=16,
    pattern="M",
    large=LargeConfig(num_heads=2),
    final_norm="rms",
    final_norm_eps=1e-6,
)


@pytest.mark.slow
def test_training_starts_from_converted_parameters(workdir):  # noqa: F811
    params = jax.jit(LM(TINY).init)(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"]
    convert.save_hf("hf", TINY, params)
    options = ["--train.steps", "3", "--train.lr", "1e-9", "--train.warmup-steps", "0"]
    options += ["--data.source", "grammar", "--data.seq-len", "32", "--train.eval-every", "0"]
    assert main(["convert", "hf-to-run", "hf", "run", *options]) == 0
    assert checkpoint.has_params_only("run")
    result = fit(config.load_config("run", ExperimentConfig), "run")
    assert result.step == 3 and not checkpoint.has_params_only("run")
    # The learning rate is so small that the parameters hardly change.
    close = jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), result.state.params, params)
    assert jax.tree.all(close)


ERRORS = {
    "convert hf-to-rnu a b": "unknown command 'convert hf-to-rnu'; did you mean hf-to-run?",
    "convert hf-to-run nothing run": "nothing must be a folder with a config.json",
    "convert hf-to-run HF taken": "RUN must be a new or an empty folder, got 'taken'",
    "convert hf-to-run HF run --dtype float16": "dtype",
    "convert run-to-hf nothing out": "nothing",
    "convert run-to-hf taken taken": "contains model.safetensors",
}


@pytest.mark.parametrize("command", ERRORS)
def test_failed_conversions_write_nothing(workdir, capsys, command):  # noqa: F811
    (workdir / "taken").mkdir()
    (workdir / "taken" / "model.safetensors").write_bytes(b"")
    assert ERRORS[command] in error_of(capsys, *command.replace("HF", str(HF)).split())


def test_damaged_weights_leave_no_run(workdir, capsys):  # noqa: F811
    source = shutil.copytree(HF, workdir / "hf", copy_function=shutil.copyfile)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "corrupt or truncated" in error_of(capsys, "convert", "hf-to-run", "hf", "run")


@pytest.mark.filterwarnings("always::xlstm_jax.convert.tensors.WeightsWarning")
def test_weights_that_are_not_finite_are_named_once(workdir, capsys):  # noqa: F811
    source = shutil.copytree(HF, workdir / "hf", copy_function=shutil.copyfile)
    arrays = safetensors.numpy.load_file(source / "model.safetensors")
    arrays["lm_head.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(arrays, source / "model.safetensors")
    assert main(["convert", "hf-to-run", "hf", "run"]) == 0
    expected = (
        "xlstm-jax: tensor 'lm_head.weight' has values that are NaN or infinite, so that the "
    )
    assert capsys.readouterr().err.startswith(expected)
    assert main(["convert", "run-to-hf", "run", "out"]) == 0
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", '{"vocab_size": 7}', '{"eos_token_id": 96}', "[" * 10**5])
def test_special_tokens_of_a_run_are_checked(workdir, capsys, text):  # noqa: F811
    assert main(["convert", "hf-to-run", str(HF), "run"]) == 0
    (workdir / "run" / "special_tokens.json").write_text(text)
    capsys.readouterr()
    assert "special_tokens.json" in error_of(capsys, "convert", "run-to-hf", "run", "out")
    assert not (workdir / "out").exists()


@pytest.mark.parametrize("arguments", [("hf-to-run", "LONG", "run"), ("hf-to-run", "HF", "LONG")])
def test_path_longer_than_file_systems_allow_is_an_error(workdir, capsys, arguments):  # noqa: F811
    words = [word.replace("HF", str(HF)).replace("LONG", "a" * 300) for word in arguments]
    assert "aaa" in error_of(capsys, "convert", *words)


@pytest.mark.slow
def test_only_errors_of_transformers_are_reported_as_not_compared(workdir, capsys, monkeypatch):  # noqa: F811
    def broken(*args):
        raise RuntimeError("no such\nkernel")

    modules = SimpleNamespace(import_module=lambda name: SimpleNamespace(__version__="1"))
    monkeypatch.setattr(compare, "importlib", modules)
    monkeypatch.setattr(compare, "_reference_logits", broken)
    command = ["convert", "hf-to-run", str(HF)]
    assert main([*command, "run", "--compare"]) == 0
    assert "cannot read or run the folder (no such kernel)" in capsys.readouterr().out
    # Different logits give exit code 5, and errors of this library are raised.
    ones = np.ones((1, 64, 96), np.float32)
    monkeypatch.setattr(compare, "_reference_logits", lambda *args: ones)
    assert main([*command, "other", "--compare"]) == 5
    assert "differ from those of transformers 1, torch 1 by" in capsys.readouterr().out
    monkeypatch.setattr(compare, "LM", broken)
    with pytest.raises(RuntimeError, match="no such"):
        main([*command, "third", "--compare"])


def test_run_to_hf_rejects_models_without_large_blocks(workdir, capsys):  # noqa: F811
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), param_shapes(SMOKE.model))
    checkpoint.save_params("run", params, config.to_dict(SMOKE))
    (workdir / "run" / "config.json").write_text(json.dumps(config.to_dict(SMOKE)))
    assert "pattern='ms' with letters other" in error_of(
        capsys, "convert", "run-to-hf", "run", "out"
    )


def test_help_lists_both_conversions(capsys):
    assert main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    assert "convert hf-to-run --help" in out and "convert run-to-hf --help" in out
    assert main(["convert"]) == 2


@pytest.mark.parametrize(
    "rules, mesh, gib",
    [
        ("data", [], 25.6),
        ("fsdp", ["--mesh.fsdp", "8"], 25.6 / 8),
        ("fsdp_tensor", ["--mesh.fsdp", "4", "--mesh.tensor", "2"], 25.6 / 8),
        ("fsdp_seq", ["--mesh.fsdp", "2", "--mesh.seq", "2"], 25.6 / 2),
    ],
)
@pytest.mark.slow
def test_describe_gives_the_memory_of_the_7b_model_under_all_rules(capsys, rules, mesh, gib):
    assert main(["describe", "xlstm_7b", "--mesh.rules", rules, *mesh]) == 0
    out = capsys.readouterr().out
    assert "6,865,424,896" in out
    words = out[out.index("(parameters ") + len("(parameters ") :]
    parameters_gib = float(words[: words.index(" MiB")].replace(",", "")) / 1024
    assert parameters_gib == pytest.approx(gib, rel=0.01)


def test_describe_rejects_a_batch_that_the_mesh_does_not_divide(workdir, capsys):  # noqa: F811
    text = error_of(capsys, "describe", "xlstm_7b", "--mesh.fsdp", "3")
    assert "data.batch_size must be a multiple of 3, the devices along data=1 x fsdp=3, got" in text
    assert "got 16; use 15 or 18" in text
