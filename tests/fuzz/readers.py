"""What the fuzzer reads: for each reader of the library, valid input and mutations of it."""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from experiments.char_lm import SMOKE
from tests import golden_files
from tests.convert.baselines import OTHERS
from tests.fuzz import mutate
from xlstm_jax import convert, data
from xlstm_jax.cli import main
from xlstm_jax.config import fingerprint, from_dict, load_config, read_json, to_dict
from xlstm_jax.convert import hf, mapping, names, tensors, v1
from xlstm_jax.data import DataConfig
from xlstm_jax.errors import printable, quote
from xlstm_jax.modules import LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig, param_shapes
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint, lock, manifest, rundir

Random = random.Random


class Case(NamedTuple):
    """One mutated input."""

    shown: Any  # what reproduces it
    read: Callable[[], Any]  # returns what was read, or an exit code and a message


class Reader(NamedTuple):
    """A reader, and how often it is tried."""

    num_cases: int
    prepare: Callable[[Path], Callable[[Random], Case]]  # with an empty folder


class Refused(NamedTuple):
    """What a reader returns instead of raising an error."""

    message: str
    code: int = 2


LARGE = LMConfig(
    vocab_size=11,
    dim=8,
    pattern="MM",
    large=LargeConfig(num_heads=2, ffn_dim=8),
    final_norm="rms",
    final_norm_eps=1e-6,
)
FIRST_SHARD = "model-00001-of-00002.safetensors"
RUN = dataclasses.replace(
    SMOKE,
    name="tiny",
    model=LMConfig(
        vocab_size=257,
        dim=8,
        pattern="ms",
        mlstm=MLSTMConfig(num_heads=2),
        slstm=SLSTMConfig(num_heads=2),
    ),
)
V1_CONFIG = {
    "vocab_size": 11,
    "embedding_dim": 8,
    "num_blocks": 2,
    "slstm_at": [1],
    "bias": False,
    "add_post_blocks_norm": True,
    "tie_weights": False,
    "dropout": 0.0,
    "mlstm_block": {
        "mlstm": {
            "num_heads": 2,
            "conv1d_kernel_size": 4,
            "qkv_proj_blocksize": 4,
            "proj_factor": 2.0,
            "round_proj_up_to_multiple_of": 8,
        }
    },
    "slstm_block": {
        "slstm": {
            "num_heads": 2,
            "conv1d_kernel_size": 4,
            "bias_init": "zeros",
            "recurrent_weight_init": "zeros",
            "group_norm_weight": True,
            "function": "slstm",
        },
        "feedforward": {"proj_factor": 1.3, "act_fn": "gelu", "ff_type": "ffn_gated"},
    },
}
YAML_LINES = (
    b"a: &a [x, x]", b"b: *a", b"use_bias: !!bool maybe", b"x: !!python/name:os.system", b"? [a]",
    b"1: one", b"on: yes", b"~: x", b"embedding_dim: 1:30", b"num_blocks: 2000000000", b"eps: .nan",
    b"norm_eps: 1e400", b"vocab_size: 0x_", b"chunk_size: 2001-99-99", b"num_heads: " + b"9" * 5000,
    b"  indented: 1", b"- a", b"---", b"...", b"%YAML 9.9", b"\t", b"a: |", b"a: >-", b"'", b'"\\x',
    b"a: " + b"[" * 20_000, b"a: " + b"x" * 50_000, b"a: \x1b[31m", b"a: \xff", b"{a: {b: {c: [}",
)  # fmt: skip


def zeros(cfg: LMConfig) -> Any:
    """Parameters of zeros."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), param_shapes(cfg))


def check_finite(values: Any) -> None:
    """Raises AssertionError if a number is NaN, infinite or beyond floats."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            check_finite(value)
    elif isinstance(values, (int, float)):
        # Comparisons, as an integer may exceed every float. NaN fails, too.
        assert abs(values) < 1e300, f"accepted {quote(values)}"


def usable_config(cfg: Any) -> Any:
    """A config that was accepted is finite, and can be written and read again."""
    values = to_dict(cfg)
    check_finite(values)
    assert from_dict(type(cfg), json.loads(json.dumps(values))) == cfg
    fingerprint(cfg)
    return cfg


def usable_model(model: tuple[LMConfig, Any]) -> LMConfig:
    """A model that was loaded has a valid config and finite parameters."""
    cfg, params = model
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    return usable_config(cfg)


def file_reader(
    write: Callable[[Path], bytes],
    change: Callable[[bytes, Random], bytes],
    read: Callable[[Path], Any],
) -> Callable[[Path], Callable[[Random], Case]]:
    """A reader of one file: `write` fills a folder and returns the file's valid contents."""

    def prepare(folder: Path) -> Callable[[Random], Case]:
        valid = write(folder)

        def read_contents(contents: bytes) -> Any:
            (folder / "input").write_bytes(contents)
            return read(folder)

        assert not isinstance(read_contents(valid), Refused)

        def case(rng: Random) -> Case:
            contents = change(valid, rng)
            return Case(contents, lambda: read_contents(contents))

        return case

    return prepare


def as_json(contents: bytes, rng: Random) -> bytes:
    """Mutated JSON text."""
    return mutate.mutate_json(json.loads(contents), rng)


def installed(name: str, contents: bytes, folder: Path, cases: Path | None = None) -> bytes:
    """Makes the name that a reader knows a link to the file `input` of the cases."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to((cases or folder) / "input")
    return contents


# Runs


def run_config(folder: Path) -> bytes:
    """A run with a config.json only."""
    return installed("config.json", json.dumps(to_dict(RUN)).encode(), folder)


def from_values(valid: Any) -> Callable[[Path], Callable[[Random], Case]]:
    """A config from Python values, as a CONFIG.py may pass them."""
    values = to_dict(valid)

    def case(rng: Random) -> Case:
        changed = mutate.mutate_value(values, rng)
        return Case(changed, lambda: usable_config(from_dict(type(valid), changed)))

    return lambda folder: case


def metrics(folder: Path) -> bytes:
    """A few records."""
    del folder
    records = [{"step": step, "loss": 1.5, "lr": 1e-3, "time": "now"} for step in range(5)]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def change_metrics(contents: bytes, rng: Random) -> bytes:
    """Mutated lines, or a mutated record."""
    lines = contents.splitlines()
    if rng.random() < 0.5:
        record = mutate.mutate_json(json.loads(lines[0]), rng)
        lines[rng.randrange(len(lines))] = record
        return b"\n".join(lines) + b"\n"
    return mutate.mutate_lines(
        contents, rng, (b"{}", b"[]", b"5", b"null", b'{"step": "a"}', b"\0" * 99)
    )


def read_metrics(folder: Path) -> Any:
    """Records are dicts with a step."""
    records = rundir.read_metrics(folder / "input")
    assert all(isinstance(record, dict) and type(record["step"]) is int for record in records)
    return records


def write_manifest(folder: Path) -> bytes:
    """The manifest of two files."""
    for name in ("state", "data"):
        (folder / name).mkdir()
        (folder / name / "file").write_bytes(name.encode() * 10)
    manifest.write(folder)
    return installed(manifest.NAME, (folder / manifest.NAME).read_bytes(), folder)


def read_manifest(folder: Path) -> Any:
    """The problem, or None."""
    problem = manifest.verify(folder)
    return None if problem is None else Refused(printable(problem))


def write_lock(folder: Path) -> bytes:
    """The lock of a process that has ended."""
    with lock.hold(folder):
        return (folder / lock.NAME).read_bytes()


def read_lock(folder: Path) -> None:
    """Takes over a lock that no process holds."""
    (folder / lock.NAME).write_bytes((folder / "input").read_bytes())
    with lock.hold(folder):
        pass


def write_checkpoint(folder: Path) -> bytes:
    """A checkpoint of parameters, of which the file with the progress is mutated."""
    checkpoint.save_params(folder, {"a": jnp.zeros(3)}, to_dict(RUN))
    paths = [path for path in (folder / checkpoint.FOLDER).glob("0/data/**/*") if path.is_file()]
    path = next(path for path in paths if b"params_alone" in path.read_bytes())
    return installed(path.name, path.read_bytes(), path.parent, folder)


def read_checkpoint(folder: Path) -> bool:
    """Reads the progress of a checkpoint whose manifest fits."""
    manifest.write(folder / checkpoint.FOLDER / "0")
    return checkpoint.has_params_only(folder)


# Weights


def hf_folder(name: str, cfg: LMConfig = LARGE) -> Callable[[Path], bytes]:
    """A checkpoint of `transformers` in shards, of which one file is mutated."""

    def write(folder: Path) -> bytes:
        shutil.rmtree(folder)
        convert.save_hf(folder, cfg, zeros(cfg), max_shard_bytes=2500)
        return installed(name, (folder / name).read_bytes(), folder)

    return write


def change_header(contents: bytes, rng: Random) -> bytes:
    """A safetensors file with a mutated header of the right or of another length."""
    if rng.random() < 0.4:
        return mutate.mutate_bytes(contents, rng)
    size = int.from_bytes(contents[:8], "little")
    header = mutate.mutate_json(json.loads(contents[8 : 8 + size]), rng)
    claimed = len(header) if rng.random() < 0.8 else rng.choice((0, size, 2**31, 2**63, 2**64 - 1))
    return claimed.to_bytes(8, "little") + header + contents[8 + size :]


def change_index(contents: bytes, rng: Random) -> bytes:
    """A mutated index; seldom with a name of a file elsewhere."""
    index = json.loads(contents)
    if rng.random() < 0.3:
        tensor = rng.choice(list(index["weight_map"]))
        names = (
            "../hf/model.safetensors",
            "/dev/zero",
            "a/b",
            "\0",
            "x" * 300,
            ".",
            "config.json",
        )
        index["weight_map"][tensor] = rng.choice(names)
        return json.dumps(index).encode()
    return mutate.mutate_json(index, rng)


def yaml_folder(folder: Path) -> bytes:
    """A checkpoint of the package xlstm."""
    params = dict(mapping.export(LARGE, names.LARGE, zeros(LARGE)))
    safetensors.numpy.save_file(params, folder / "model.safetensors")
    config = {"embedding_dim": 8, "num_blocks": 2, "num_heads": 2, "vocab_size": 11}
    config |= {"ffn_round_up_to_multiple_of": 8, "ffn_proj_factor": 1.0, "qk_dim_factor": 0.5}
    config |= {"add_out_norm": True, "use_bias": False, "norm_eps": 1e-6, "gate_soft_cap": 15.0}
    config |= {"output_logit_soft_cap": 30.0, "weight_mode": "single", "chunk_size": 64}
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items())
    return installed("config.yaml", text.encode(), folder)


def change_yaml(contents: bytes, rng: Random) -> bytes:
    """Mutated lines, or mutated values: JSON is YAML, too."""
    if rng.random() < 0.5:
        return mutate.mutate_lines(contents, rng, YAML_LINES)
    pairs = (line.split(": ") for line in contents.decode().splitlines())
    return mutate.mutate_json({name: json.loads(value) for name, value in pairs}, rng)


def tirex_folder(folder: Path) -> bytes:
    """A checkpoint of TiRex-2."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden_files.FOLDER / "tirex2_tiny" / name, folder / name)
    return installed("config.json", (folder / "config.json").read_bytes(), folder)


def token_ids(folder: Path) -> bytes:
    """The default special tokens."""
    del folder
    return json.dumps(dict(hf.SPECIAL_TOKENS)).encode()


def special_tokens(folder: Path) -> Any:
    """Checks special tokens as `convert run-to-hf` does."""
    values = hf.check_special_tokens(
        read_json(folder / "input"), LARGE.vocab_size, "special tokens"
    )
    return hf.config_of(LARGE) | values


def v1_model(folder: Path) -> Callable[[Random], Case]:
    """A first-generation model with a mutated config and mutated arrays."""
    del folder
    cfg = v1.config_of(V1_CONFIG)
    arrays = dict(mapping.export(cfg, names.V1, zeros(cfg)))
    new_arrays: tuple[Any, ...] = (
        np.zeros(3, np.int32),
        np.float32(1),
        np.zeros((0, 4), np.float32),
        None,
        [1.0],
    )

    def case(rng: Random) -> Case:
        config = mutate.mutate_value(V1_CONFIG, rng)
        changed: dict[str, Any] = dict(arrays)
        if rng.random() < 0.5:
            name = rng.choice(list(changed))
            array = changed.pop(name)
            config = copy.deepcopy(V1_CONFIG)
            changed[rng.choice((name, "a" * 300, "module." + name))] = rng.choice(
                (array, *new_arrays)
            )
        shown = config, {name: np.shape(array) for name, array in changed.items()}
        return Case(shown, lambda: usable_model(convert.load_v1(config, changed)))

    return case


# Text


def text_file(folder: Path) -> bytes:
    """Some lines."""
    del folder
    return b"".join(b"line %d of a text\n" % number for number in range(60))


def change_text(contents: bytes, rng: Random) -> bytes:
    """Mutated text, compressed or not, in some encoding."""
    if rng.random() < 0.3:
        return mutate.mutate_bytes(gzip.compress(contents), rng)
    if rng.random() < 0.3:
        return (
            contents.decode()
            .replace("\n", rng.choice("\r\x85 \0"))
            .encode(rng.choice(("utf-16", "utf-8")))
        )
    return mutate.mutate_bytes(contents, rng)


def read_text(folder: Path) -> Any:
    """Every token is in the vocabulary."""
    cfg = DataConfig(source=str(folder / "input"), seq_len=8, batch_size=2)
    for split in ("train", "valid"):
        examples = data.load(cfg, split)
        inputs = examples.batch(np.arange(1)).inputs
        assert 0 <= inputs.min() and inputs.max() < examples.vocab_size
    return examples


# Commands


def command_outcome(arguments: list[str]) -> Any:
    """Runs a command in this process."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(arguments)
    if code == 0:
        return code
    message = errors.getvalue()
    assert message.startswith("xlstm-jax: ") or not arguments, message[:200]
    return Refused(message.removesuffix("\n"), code)


def commands(folder: Path) -> Callable[[Random], Case]:
    """Command lines of commands that compute nothing, as the run has no checkpoint."""
    run = folder / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(RUN)))
    (folder / "CONFIG.py").write_text("def config(size='a'):\n    return 1 / 0\n")
    lines = (
        ["describe", "run", "--train.lr", "0.1"],
        ["describe", "CONFIG.py"],
        ["describe", "run", "--model.dim", "7"],
        ["generate", "run", "--prompt", "a", "--temperature", "0.5"],
        ["evaluate", "run", "--split", "valid"],
        ["convert", "run-to-hf", "run", "out"],
    )
    options = (
        "--model.dim --model.pattern --model.mlstm.num-heads --train.lr --train.steps --unknown -x "
        "--data.seq-len --data.batch-size --mesh.fsdp --mesh.rules --train.schedule --size --step "
        "--import --top-k --top-p --min-p --seed --stop --max-new-tokens --temperature --source "
        "--repetition-penalty --max-batches --batch-size --dtype --max-shard-bytes "
        "--train.warmup-steps"
    ).split()

    def case(rng: Random) -> Case:
        arguments = mutate.mutate_arguments(rng.choice(lines), options, rng)
        return Case(arguments, lambda: in_folder(arguments))

    def in_folder(arguments: list[str]) -> Any:
        with contextlib.chdir(folder):
            # `train` and `plan` compute; help is printed for its own sake.
            if (
                not arguments
                or arguments[0] in ("train", "plan")
                or {"-h", "--help"} & {*arguments}
            ):
                return None
            return command_outcome(arguments)

    return case


def hf_to_run(folder: Path) -> Callable[[Random], Case]:
    """The command that imports weights, with one of their files mutated."""
    convert.save_hf(folder / "hf", LARGE, zeros(LARGE))
    changes = {"config.json": as_json, "model.safetensors": change_header}
    valid = {name: (folder / "hf" / name).read_bytes() for name in changes}

    def case(rng: Random) -> Case:
        name = rng.choice(list(changes))
        contents = changes[name](valid[name], rng)
        return Case((name, contents), lambda: run(name, contents))

    def run(name: str, contents: bytes) -> Any:
        shutil.rmtree(folder / "run", ignore_errors=True)
        (folder / "hf" / name).write_bytes(contents)
        try:
            outcome = command_outcome(
                ["convert", "hf-to-run", str(folder / "hf"), str(folder / "run")]
            )
            assert outcome == 0 or not os.path.exists(folder / "run"), "an incomplete run is left"
            return outcome
        finally:
            (folder / "hf" / name).write_bytes(valid[name])

    return case


def loaded(load: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Loads a model and checks that it can be used."""
    return lambda folder: usable_model(load(folder))


READERS: dict[str, Reader] = {
    "config.json of a run": Reader(
        300,
        file_reader(run_config, as_json, lambda f: usable_config(load_config(f, ExperimentConfig))),
    ),
    "config.json of an earlier start": Reader(
        150, file_reader(run_config, as_json, lambda f: rundir.check(f, RUN))
    ),
    "TrainConfig": Reader(300, from_values(TrainConfig())),
    "LMConfig": Reader(400, from_values(RUN.model)),
    "DataConfig": Reader(150, from_values(DataConfig())),
    "MeshConfig": Reader(50, from_values(RUN.mesh)),
    "ExperimentConfig": Reader(150, from_values(RUN)),
    "metrics.jsonl": Reader(200, file_reader(metrics, change_metrics, read_metrics)),
    "manifest.json": Reader(200, file_reader(write_manifest, as_json, read_manifest)),
    "run.lock": Reader(100, file_reader(write_lock, as_json, read_lock)),
    "data of a checkpoint": Reader(60, file_reader(write_checkpoint, as_json, read_checkpoint)),
    "config.json of transformers": Reader(
        250, file_reader(hf_folder("config.json"), as_json, loaded(convert.load_hf))
    ),
    **{
        f"config.json of {name}": Reader(
            60, file_reader(hf_folder("config.json", cfg), as_json, loaded(convert.load_hf))
        )
        for name, cfg in OTHERS.items()
    },
    "index of shards": Reader(
        150, file_reader(hf_folder(tensors.INDEX), change_index, loaded(convert.load_hf))
    ),
    "safetensors file": Reader(
        200, file_reader(hf_folder(FIRST_SHARD), change_header, loaded(convert.load_hf))
    ),
    "config.yaml": Reader(250, file_reader(yaml_folder, change_yaml, loaded(convert.load_large))),
    "config.json of TiRex-2": Reader(40, file_reader(tirex_folder, as_json, convert.load_tirex)),
    "special_tokens.json": Reader(200, file_reader(token_ids, as_json, special_tokens)),
    "first-generation model": Reader(80, v1_model),
    "text file": Reader(150, file_reader(text_file, change_text, read_text)),
    "command line": Reader(300, commands),
    "convert hf-to-run": Reader(48, hf_to_run),
}
"""Name of a reader -> its cases. A new reader of files gets an entry here."""
