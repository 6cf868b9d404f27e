"""The commands: results, exit codes, and one-line errors that leave the files unchanged."""

import dataclasses
import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.char_lm import SMOKE
from xlstm_jax import config, cpu, data
from xlstm_jax.cli import console, main, train
from xlstm_jax.config import user_code
from xlstm_jax.errors import ConfigError, UnsupportedError
from xlstm_jax.plan import topology
from xlstm_jax.train import DivergedError, FitResult, TrainState
from xlstm_jax.train.guard import Guard

CONFIG = str(Path(__file__).parents[1] / "experiments" / "char_lm.py")

# Result of a fake `fit`; its contents are not used.
STATE = TrainState(
    step=jnp.array(0), params={}, opt_state={}, guard=Guard.start(), lr_scale=jnp.array(1.0)
)


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch, one_device):
    """An empty working directory, without `cpu.prepare`, which changes the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    # Else configs of later tests record the modules that a test imports.
    monkeypatch.setattr(user_code, "imported", {})
    return tmp_path


STOPPED = FitResult(state=STATE, step=3, finished=False, evaluation=None)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(capsys, *argv):
    """Runs a command that must fail without changing a file; returns its one-line error."""
    folder = Path.cwd()
    before = files(folder)
    assert main([*argv]) == 2
    assert files(folder) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xlstm-jax: ") and err.endswith(".\n") or err.endswith("?\n")
    assert err.count("\n") == 1
    return err.removeprefix("xlstm-jax: ").strip()


# Command line -> part of its error.
ERRORS = {
    "trian CONFIG": "unknown command 'trian'; did you mean train?",
    "train": "the first argument must be a config, got none; write `xlstm-jax train CONFIG.py`",
    "train --size smoke": "the first argument must be a config, got '--size'",
    "train missing.py": "missing.py does not exist",
    "train CONFIG --size big": "size='big' is unknown; use one of: smoke, cpu, paper.",
    "train CONFIG --model.dmi 8": "--model.dmi is not an option of `xlstm-jax train`; did you mean "
    "--model.dim",
    "train CONFIG --lr 1": "--lr is not an option of `xlstm-jax train`; did you mean --train.lr",
    "train CONFIG --zzz 1": "--zzz is not an option of `xlstm-jax train`; see",
    "train CONFIG --trian.lr=1": "did you mean --train.lr",
    "train CONFIG extra": "extra is not an option of `xlstm-jax train`",
    "train CONFIG --model.dim": "missing value for argument '--model.dim'",
    "train CONFIG --model.dim wide": "invalid value for --model.dim: invalid literal for int()",
    "train CONFIG --model.dtype half": "invalid choice 'half' for argument '--model.dtype', "
    "expected one of ('float32', 'bfloat16')",
    "train CONFIG --model.dim 0": "dim must be at least 1, got 0",
    "train CONFIG --model.pattern mx": "pattern='mx'",
    "train CONFIG --model.mlstm.num-heads 3": "num_heads must divide",
    "train CONFIG --model.mlstm.chunk-size 0": "chunk_size must be at least 1, got 0",
    "train CONFIG --model.mlstm.implementation fast": "implementation='fast' is not known",
    "train CONFIG --model.pattern q": "letter='q' is not known; use one of: m, s, M, l, L, a, w, ",
    "train CONFIG --model.window.window 0": "window.window must be at least 1, got 0; the default",
    "train CONFIG --model.window.window 4000": "set window.cache_size to at least 4004",
    "train CONFIG --model.pattern a --model.attention.num-kv-heads 3": "must divide num_heads=4",
    "train CONFIG --model.pattern a --model.attention.head-dim 7": "even number of the 7 features",
    "train CONFIG --model.attention.implementation fast": "use one of: auto, decode, cudnn, splash",
    "train CONFIG --size smoke --data.source nowhere": "data.source='nowhere' is neither",
    "train CONFIG --size smoke --data.batch-size 100000": "data.batch_size=100000 must be at most",
    "train CONFIG --size smoke --model.vocab-size 9": "model.vocab_size must be at least 257",
    "train CONFIG --train.accumulation 3": "must be a multiple of train.accumulation",
    "train CONFIG --train.lr -1": "train.lr must be above 0, got -1",
    "train CONFIG --size smoke --run-dir file": "run_dir='file' must be a folder",
    "train CONFIG --size smoke --run-dir file/run": "run_dir='file/run' must be a folder",
    "plan xlstm_9b": "preset 'xlstm_9b' is not known; did you mean xlstm_7b",
    "train CONFIG --size smoke --run-dir other": "belongs to another config (train.lr: 0.003, "
    "stored 0.5)",
    "describe CONFIG --model.dim 0": "dim must be at least 1, got 0",
    "describe CONFIG --fresh": "--fresh is not an option of `xlstm-jax describe`",
    "plan CONFIG --topology v9:2x2": "topology='v9:2x2' must be a chip and a shape",
    "plan CONFIG --out nowhere/plan.json": "--out must be a file in an existing folder, got",
    "plan CONFIG --topology h100:2x8 --slices 2": "slices must be 1 for GPUs, got 2",
    "evaluate": "`xlstm-jax evaluate` needs MODEL",
    "evaluate nowhere": "nowhere does not exist",
    "evaluate other": "other has no checkpoint yet; train it first",
    "evaluate other --split all": "invalid choice 'all' for argument '--split'",
    "generate other": "`xlstm-jax generate` needs --prompt",
    "generate other --prompt": "missing value for argument '--prompt'",
    "generate other --prompt=": "--prompt must not be empty, got ''",
    "generate other --prompt a --top-k 0": "top_k must be at least 1, got 0",
    "generate other --prompt a --top-p nan": "top_p must be 0 or a number from 1.2e-38",
    "generate other --prompt a --temperature inf": "temperature must be 0 or a number",
    "generate other --prompt a --temperature -1": "temperature must be from 1e-06 to 1000000.0",
    "generate other --prompt a --temperature 1e-30": "temperature must be from 1e-06",
    "generate other --prompt a --stop=": "--stop must not be empty, got ''",
    "evaluate EMPTY": "the argument of `xlstm-jax evaluate` must not be empty, got ''",
    "train EMPTY": "the first argument must be a config, got ''",
    "train CONFIG --run-dir EMPTY": "--run-dir must not be empty, got ''",
    "train LONG": "aaa: file name too long; pass a path",
    "evaluate LONG": "aaa does not exist; pass the folder of a run",
    "generate LONG --prompt a": "aaa does not exist; pass the folder of a run",
    "generate empty --prompt a": "empty has no config.json; pass the folder of a run or of a model",
    "evaluate empty": "empty has no config.json; pass the folder of a run or of a model",
    "generate file --prompt a": "file is a file; pass the folder of a run or of a model",
    "describe LONG": "preset 'aaa",
    "describe NUL": "arguments must have no NUL characters",
    "describe ~nobody-of-this-name/x": "names a home directory that does not exist",
    "evaluate ~nobody-of-this-name/x": "names a home directory that does not exist",
    "evaluate \udcff": "\\udcff does not exist",
    "train CONFIG --\udcff": "--\\udcff is not an option",
    "evaluate list": "list/config.json: ExperimentConfig must be a table of fields, got [].",
    "train CONFIG --import LONG": "aaa must name a .py file or a module",
    "train CONFIG --train.steps 1e1": "invalid value for --train.steps",
    "train CONFIG --train.warmup-steps inf": "train.warmup_steps must be 0 or a number",
    "plan CONFIG --out list": "--out must be a file in an existing folder, got list",
    "generate other --prompt a --top-q 1": "did you mean --top-p or --top-k",
    "generate other --prompt a": "other has no checkpoint yet; train it first",
}


@pytest.mark.parametrize("line", ERRORS)
def test_bad_arguments_give_a_one_line_error(workdir, capsys, line):
    (workdir / "file").write_text("no folder")
    (workdir / "empty").mkdir()
    cfg = dataclasses.replace(SMOKE, train=dataclasses.replace(SMOKE.train, lr=0.5))
    (workdir / "other").mkdir()
    (workdir / "other" / "config.json").write_text(json.dumps(config.to_dict(cfg)))
    (workdir / "list").mkdir()
    (workdir / "list" / "config.json").write_text("[]")
    words = {"CONFIG": CONFIG, "EMPTY": "", "LONG": "a" * 300, "NUL": "a\0b"}
    argv = [words.get(word, word) for word in line.split()]
    assert ERRORS[line] in error_of(capsys, *argv)


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "XLSTM_IMPORT"])
def test_bad_environment_variables_give_a_one_line_error(monkeypatch, capsys, name):
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}
    for variable, value in (variables if name.startswith("JAX") else {}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv(name, "nonexistent")
    error = error_of(capsys, "train", CONFIG)
    assert name in error and "nonexistent" in error


@pytest.mark.usefixtures("unchecked_types")
def test_an_error_in_a_config_is_one_line_with_its_location(workdir, capsys):
    (workdir / "broken.py").write_text("def config():\n    return 1 / 0\n")
    assert "broken.py:2: ZeroDivisionError: division by zero" in error_line(capsys, "broken.py")
    text = "from xlstm_jax.modules import LMConfig\n\nLMConfig(vocabsize=1, dim=16, pattern='m')\n"
    (workdir / "misspelled.py").write_text(text)
    assert "argument 'vocabsize'; did you mean vocab_size?" in error_line(capsys, "misspelled.py")


def error_line(capsys, path):
    assert main(["train", path]) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("unchecked_types")
def test_a_config_may_use_numpy_numbers_and_modules_beside_it(workdir, capsys):
    (workdir / "shared_values.py").write_text("import numpy as np\n\nDIM = np.int64(16)\n")
    (workdir / "c.py").write_text(
        "import dataclasses\n\nfrom experiments.char_lm import SMOKE\n"
        "from shared_values import DIM\n\ndef config():\n"
        "    model = dataclasses.replace(SMOKE.model, dim=DIM)\n"
        "    return dataclasses.replace(SMOKE, model=model)\n"
    )
    assert main(["describe", "c.py"]) == 0
    assert " 16 x 257 " in capsys.readouterr().out


def test_tilde_is_the_home_directory_in_every_path(workdir, monkeypatch):
    calls = []

    def fit(cfg, run_dir, **options):
        calls.append(run_dir)
        return STOPPED

    monkeypatch.setenv("HOME", str(workdir / "home"))
    monkeypatch.setattr(train, "fit", fit)
    assert main(["train", CONFIG, "--size", "smoke", "--run-dir=~/runs/a"]) == 0
    assert calls == [workdir / "home" / "runs" / "a"]


@pytest.mark.parametrize("pattern, is_logged", [("M", True), ("mM", False)])
def test_training_says_that_a_model_of_large_blocks_cannot_be_exported(
    monkeypatch, caplog, pattern, is_logged
):
    monkeypatch.setattr(train, "fit", lambda *_, **__: STOPPED)
    assert main(["train", CONFIG, "--size", "smoke", "--model.pattern", pattern]) == 0
    assert ("cannot be exported to transformers: final_norm" in caplog.text) == is_logged


def test_a_model_that_cannot_be_exported_is_refused_before_training(monkeypatch, capsys):
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("trains"))
    assert main(["train", CONFIG, "--size", "smoke", "--train.export-every", "2"]) == 2
    error = capsys.readouterr().err
    assert (
        "train.export_every=2 needs a model that transformers supports, got pattern='ms'" in error
    )


def test_exports_have_the_layout_of_transformers(monkeypatch, workdir):
    options, saved = {}, []

    def fit(cfg, run_dir, **given):
        options.update(given)
        return STOPPED

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train.convert.convert, "save_hf", lambda *args, **_: saved.append(args))
    large = ["--model.pattern=M", "--model.final-norm=rms", "--model.final-norm-eps=1e-6"]
    large += ["--model.no-final-norm-bias", "--train.export-every=2"]
    assert main(["train", CONFIG, "--size", "smoke", *large]) == 0
    options["exporter"](workdir / "out", {"a": 1})
    ((folder, cfg, params),) = saved
    assert (folder, cfg.pattern, params) == (workdir / "out", "M", {"a": 1})


@pytest.mark.parametrize(
    "error, code, text",
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 4, "a/b: no space left"),
        (ConnectionResetError("connection reset"), 4, "connection reset"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 2, "c: permission denied"),
        (MemoryError(), 4, "out of memory (MemoryError)"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nat line 1"), 4, "out of memory (RES"),
        (UnsupportedError("no implementation"), 2, "no implementation"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_have_an_exit_code_and_one_line(monkeypatch, capsys, error, code, text):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(train, "fit", fail)
    assert main(["train", CONFIG, "--size", "smoke"]) == code
    message = capsys.readouterr().err
    assert message.startswith(f"xlstm-jax: {text}") and message.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("UNKNOWN: Gloo AllReduce failed: reset by peer"), 4, "another process of"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 4, "a/b: no space left"),
        (ConfigError("steps must be 3."), 2, "steps must be 3."),
        (ValueError("a bug"), 1, None),
    ],
)
def test_a_process_that_fails_ends_without_waiting_for_the_others(
    monkeypatch, capsys, error, code, text
):
    """The others may wait for it in a collective operation, and JAX's exit waits for them."""

    class EndOfProcess(BaseException):
        pass

    def end(actual):
        assert actual == code
        raise EndOfProcess

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(train, "fit", fail)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "init_distributed", lambda processes: None)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(EndOfProcess):
        main(["train", CONFIG, "--size", "smoke"])
    message = capsys.readouterr().err
    if text is None:
        assert message.startswith("Traceback") and "ValueError: a bug" in message
    else:
        assert message.startswith(f"xlstm-jax: {text}") and message.count("\n") == 1


def test_output_that_stdout_cannot_encode_is_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    console.print_fields({"name": "\udcff \N{EURO SIGN}"})
    console.print_table(["a"], [["\udcff"]])
    stream.flush()
    assert stream.buffer.getvalue().split() == [b"name", b"?", b"?", b"a", b"?"]


def test_errors_raised_outside_the_library_keep_their_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("not of the library")

    monkeypatch.setattr(train, "fit", broken)
    with pytest.raises(ValueError, match="not of the library"):
        main(["train", CONFIG, "--size", "smoke"])


@pytest.mark.parametrize("command", ["train", "describe", "plan"])
def test_help_lists_every_field_of_the_config_with_its_default(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([command, CONFIG, "--size", "smoke", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    fields = config.flatten(config.to_dict(SMOKE))
    for name, value in fields.items():
        option = f"--{name.replace('_', '-')}"
        assert f" {option}" in text, option
        words = value if isinstance(value, (list, dict)) else [value]
        default = text[text.index("(default: ", text.index(f" {option}")) :]
        assert default.startswith(f"(default: {shlex.join(map(str, words))})"), option


def test_help_without_a_config_lists_the_same_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name.replace('_', '-')}" in text for name in config.flatten(config.to_dict(SMOKE))
    )
    assert "--run-dir" in text and "--fresh" in text and "--processes.coordinator" in text


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_xlstm_jax_without_a_command_lists_the_commands(capsys, argv, code):
    assert main(argv) == code
    text = capsys.readouterr().out
    assert all(
        f"xlstm-jax {name} " in text for name in ("train", "evaluate", "generate", "describe")
    )


def test_options_reach_fit_with_hyphens_or_underscores(monkeypatch):
    calls = []

    def fit(cfg, run_dir, **options):
        calls.append((cfg, run_dir, options["fresh"]))
        return FitResult(state=STATE, step=3, finished=False, evaluation=None)

    monkeypatch.setattr(train, "fit", fit)
    options = "--size smoke --run-dir here --fresh --train.lr 1e-4 --model.mlstm.num_heads 2"
    more = "--train.warmup-steps=5 --model.mlstm.forget-bias 1 2 --train.grad-clip None"
    assert main(["train", CONFIG, *options.split(), *more.split()]) == 0
    ((cfg, run_dir, fresh),) = calls
    assert (run_dir, fresh) == (Path("here"), True)
    assert cfg.train == dataclasses.replace(SMOKE.train, lr=1e-4, warmup_steps=5, grad_clip=None)
    mlstm = dataclasses.replace(SMOKE.model.mlstm, num_heads=2, forget_bias=(1.0, 2.0))
    assert cfg.model == dataclasses.replace(SMOKE.model, mlstm=mlstm)
    assert cfg.data == SMOKE.data


@pytest.mark.parametrize(("step", "evaluated_at"), [(7, None), (20, None), (20, 10)])
def test_a_stopped_run_exits_with_0(monkeypatch, capsys, step, evaluated_at):
    """Also when it was stopped after its last step, during the final evaluation."""
    evaluation = None if evaluated_at is None else {"step": evaluated_at, "valid_loss": 1.0}
    stopped = FitResult(state=STATE, step=step, finished=step == 20, evaluation=evaluation)
    monkeypatch.setattr(train, "fit", lambda *args, **options: stopped)
    assert main(["train", CONFIG, "--size", "smoke"]) == 0
    assert f"Stopped at step {step} of 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batches", "scope"),
    [
        ("1", "over 4 of {n:,} windows, spread evenly; `xlstm-jax evaluate runs/char_lm`"),
        ("None", "over all {n:,} windows"),
    ],
)
def test_final_message_says_how_many_windows_were_evaluated(monkeypatch, capsys, batches, scope):
    evaluation = {"step": 20, "valid_loss": 1.5, "valid_bits_per_byte": 2.25, "valid_tokens": 9}
    done = FitResult(state=STATE, step=20, finished=True, evaluation=evaluation)
    monkeypatch.setattr(train, "fit", lambda *args, **options: done)
    monkeypatch.setattr(train, "_show_sample", lambda *args: None)
    assert main(["train", CONFIG, "--size", "smoke", "--train.eval-batches", batches]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("validation"))
    count = len(data.load(SMOKE.data, "valid"))
    assert f"2.2500 bits per byte, 1.5000 nats per token, {scope.format(n=count)}" in line


def test_a_diverged_run_exits_with_3(monkeypatch, capsys):
    def fit(*args, **options):
        raise DivergedError("8 consecutive updates were skipped; lower train.lr.")

    monkeypatch.setattr(train, "fit", fit)
    assert main(["train", CONFIG, "--size", "smoke"]) == 3
    assert capsys.readouterr().err == (
        "xlstm-jax: 8 consecutive updates were skipped; lower train.lr.\n"
    )


def test_default_run_dir_follows_the_config(workdir):
    (workdir / "old").mkdir()
    assert train._default_run_dir(Path(CONFIG)) == Path("runs/char_lm")
    assert train._default_run_dir(Path("old/config.json")) == Path("old")
    assert train._default_run_dir(Path("old")) == Path("old")


def remove_compiler(monkeypatch):
    result = (), "no compiler"
    monkeypatch.setattr(topology, "_describe", lambda *args, **kwargs: result)


def test_plan_prints_the_resources_and_writes_only_its_json_file(workdir, capsys, monkeypatch):
    remove_compiler(monkeypatch)
    argv = ["plan", "scaling_160m", "--topology", "h100:2x8", "--mesh.fsdp", "8"]
    assert main([*argv, "--data.batch-size", "16", "--out", "plan.json"]) == 0
    text = capsys.readouterr().out
    assert "data 2 x fsdp 8 under fsdp" in text and "fits" in text and "network bound" in text
    assert "not compiled, estimated by formula: no compiler" in text
    fields = json.loads((workdir / "plan.json").read_text())
    assert fields["num_chips"] == 16 and fields["fits"] and fields["limit"] == "network"
    assert list(files(workdir)) == [workdir / "plan.json"]


@pytest.mark.slow
def test_plan_search_prints_the_flags_of_the_best_configuration(capsys, monkeypatch):
    remove_compiler(monkeypatch)
    argv = ["plan", CONFIG, "--size", "smoke", "--topology", "v5e:2x2", "--search"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    flags = text[text.rindex("--mesh.data") :].split()
    assert flags[:2] == ["--mesh.data", "4"] and "--data.batch-size" in flags
    assert f"{' '.join(flags)}: " in text  # printed when it was compiled


def test_describe_prints_shapes_costs_and_weight_decay_and_writes_nothing(workdir, capsys):
    assert main(["describe", CONFIG, "--size", "smoke"]) == 0
    text = capsys.readouterr().out
    assert not files(workdir)
    fields = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert fields["lm_head/kernel"] == "32 x 257 8,224 yes".split()
    assert fields["token_embedding/embedding"][-1] == "no"
    counts = [
        int(cells[-2].replace(",", "")) for cells in fields.values() if cells[-1] in ("yes", "no")
    ]
    assert fields["parameters"] == [f"{sum(counts):,}"]
    assert "256 = 4 x 64" in text and "FLOPs per token" in text and "on one device" in text
    assert "trained" not in fields


def test_describe_counts_the_parameters_that_are_trained(workdir, capsys):
    assert main(["describe", CONFIG, "--size", "smoke", "--train.freeze", "^(?!lm_head)"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"trained +8,224 \(", text)
    assert main(["describe", CONFIG, "--size", "smoke", "--train.freeze", "nothing"]) == 2


def test_cpu_settings_are_applied_before_the_command_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "prepare", lambda: calls.append("prepare"))
    monkeypatch.setattr("xlstm_jax.cli.commands._dispatch", lambda args: calls.append(args) or 0)
    assert main(["describe"]) == 0
    assert calls == ["prepare", ["describe"]]


def xlstm_jax(*argv):
    """Runs a command in a new process, which must succeed; returns its output."""
    command = [sys.executable, "-m", "xlstm_jax", *argv]
    process = subprocess.run(command, capture_output=True, timeout=600)
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode()


@pytest.mark.slow
def test_train_generate_evaluate_and_rerun_of_a_small_run(workdir, capsys):
    first = xlstm_jax("train", CONFIG, "--size", "smoke")
    run = workdir / "runs" / "char_lm"
    for text in ("bits per byte", "runs/char_lm/checkpoints/20", "runs/char_lm/loss.png"):
        assert text in first
    assert (run / "loss.png").is_file() and (run / "checkpoints" / "20").is_dir()
    sample = first.split(":\n\n")[-1].removesuffix("\n")
    assert len(sample) == 300

    options = ["--prompt", "the old cell", "--max-new-tokens", "40", "--temperature", "0"]
    generated = xlstm_jax("generate", "runs/char_lm", *options)
    assert generated.startswith("the old cell")

    assert main(["evaluate", "runs/char_lm", "--split", "test", "--by-position"]) == 0
    evaluated = capsys.readouterr().out
    assert "bits per byte" in evaluated and "32-63" in evaluated

    # The run is finished: only the report is printed again, with the same sample.
    assert main(["train", "runs/char_lm/config.json"]) == 0
    again = capsys.readouterr().out
    assert again.split(":\n\n")[-1].removesuffix("\n") == sample
    assert "step 5/20" not in again

    array = max((run / "checkpoints" / "20" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    os.truncate(array, array.stat().st_size // 2)
    assert "bytes, got" in error_of(capsys, "evaluate", "runs/char_lm")
    assert "bytes, got" in error_of(capsys, "train", "runs/char_lm/config.json")


@pytest.mark.slow
def test_an_interrupted_run_saves_a_checkpoint_and_exits_with_0(workdir):
    options = ["--size", "smoke", "--train.steps", "100000", "--train.schedule", "constant"]
    command = [sys.executable, "-m", "xlstm_jax", "train", CONFIG, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        metrics = workdir / "runs" / "char_lm" / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert "the same command resumes it" in out
    step = max(int(p.name) for p in (workdir / "runs/char_lm/checkpoints").iterdir())
    assert f"Stopped at step {step} of 100000" in out
