"""`xlstm-jax convert hf-to-run` and `run-to-hf`: imports and exports `transformers` weights."""

import contextlib
import dataclasses
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from xlstm_jax import convert, hub
from xlstm_jax.cli import console, options, subcommands
from xlstm_jax.cli.exit_codes import DONE, WRONG_RESULT
from xlstm_jax.config import ConfigError, load_config, read_json, to_dict, user_path
from xlstm_jax.convert import card, compare, hf, license, push, remote, tensors
from xlstm_jax.data.config import DataConfig
from xlstm_jax.data.tokenizers import locate
from xlstm_jax.errors import quote_path
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.train import checkpoint, rundir
from xlstm_jax.train.checkpoint import restore_params
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.typing import PyTree

SPECIAL_TOKENS = "special_tokens.json"
"""File in a converted run: the special token ids of the source config, written back on export."""

LICENSE = "license of the weights"

# A Path would drop one of the slashes of hf://.
Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
Dtype = Literal["float32", "bfloat16"]
Fields = dict[str, Any]  # what to print, by name: texts, counts, and a `compare.Comparison`


@dataclasses.dataclass(frozen=True, kw_only=True)
class HfToRun(options.ModelCommand):
    """Converts a checkpoint folder of `transformers` to a run, to evaluate or to train further."""

    folder: Folder  # with config.json and safetensors files, or hf://ORG/NAME[@REVISION]
    run: options.RunPath  # directory of the run; must be new or empty
    dtype: Dtype | None = None  # of activations; None: the dtype in the folder's config
    compare: bool = False  # compare the logits with those of transformers, in float32
    json: bool = False  # print the results as JSON
    data: DataConfig = DataConfig()  # data of the run
    train: TrainConfig = TrainConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunToHf(options.ModelCommand):
    """Converts a run to a checkpoint folder that `transformers` loads."""

    run: options.RunPath  # directory of a run
    folder: Folder  # output, new or without weights; or hf://ORG/NAME, to upload to
    step: int | None = None  # checkpoint to convert; None: the newest
    dtype: Dtype = "float32"  # of the stored tensors
    max_shard_bytes: int = 10**9  # largest size of one file
    compare: bool = False  # compare the logits with those of transformers, in float32
    json: bool = False  # print the results as JSON
    private: bool = True  # of a new repository hf://; an existing one stays as it is


def run(argv: list[str]) -> int:
    """Runs a conversion; returns 0, or 5 if `--compare` measured different logits.

    Raises:
        ConfigError: an option, the run or the weights are invalid; nothing has been written.
        NetworkError: the hub cannot be reached.
    """
    with _short_warnings():
        return subcommands.run("convert", CONVERSIONS, argv)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Prints warnings about the weights as one line, without their source location."""

    def show(message: Warning | str, category: type[Warning], *location: Any) -> None:
        if issubclass(category, tensors.WeightsWarning):
            print(f"xlstm-jax: {message}", file=sys.stderr)
        else:
            show_others(message, category, *location)

    show_others = warnings.showwarning
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _hf_to_run(argv: list[str]) -> int:
    args = options.parse("convert hf-to-run", HfToRun, argv)
    if args.run.exists() and (not args.run.is_dir() or any(args.run.iterdir())):
        raise ConfigError(
            "RUN must be a new or an empty folder, got "
            f"{quote_path(args.run)!r}; choose another one."
        )
    folder = remote.find(args.folder)
    model, params = convert.load_hf(folder, dtype=args.dtype)
    cfg = ExperimentConfig(
        name=args.run.resolve().name, model=model, data=args.data, train=args.train
    )
    imports_tokenizer = cfg.data.tokenizer == DataConfig().tokenizer and locate.has_tokenizer(
        folder
    )
    if imports_tokenizer:
        name = args.folder if hub.is_address(args.folder) else str(folder.resolve())
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=name))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    facts = {"num_params": num_params, "converted_from": _identity(args.folder, folder)}
    try:
        rundir.prepare(args.run, cfg, facts, step=0)
        license_name = license.copy(folder, args.run)
        special_tokens = hf.special_tokens_of(folder, model.vocab_size)
        rundir.write_json(args.run / SPECIAL_TOKENS, special_tokens)
        if imports_tokenizer:
            locate.copy_files(folder, args.run / rundir.TOKENIZER)
        checkpoint.save_params(args.run, params, to_dict(cfg))
    except BaseException:
        shutil.rmtree(args.run, ignore_errors=True)  # never leave an incomplete run behind
        raise
    fields: Fields = {"written": str(args.run), "parameters": num_params, LICENSE: license_name}
    fields["tokenizer"] = (
        f"copied to {args.run / rundir.TOKENIZER}"
        if imports_tokenizer
        else f"{cfg.data.tokenizer!r} of the run"
    )
    agrees = not args.compare or _compare(fields, folder)
    _show(fields, as_json=args.json)
    return DONE if agrees else WRONG_RESULT


def _identity(source: str, folder: Path) -> str:
    """The source of weights, with the commit if it is on the hub."""
    if not hub.is_address(source):
        return source
    return str(hub.parse(source)._replace(revision=folder.name))


def _run_to_hf(argv: list[str]) -> int:
    args = options.parse("convert run-to-hf", RunToHf, argv)
    if hub.is_address(args.folder):
        return _push(args)
    folder = user_path(args.folder)
    tensors.check_writable(folder)
    fields: Fields = {"written": str(folder)} | _write(args, folder)
    agrees = not args.compare or _compare(fields, folder)
    _show(fields, as_json=args.json)
    return DONE if agrees else WRONG_RESULT


def _push(args: RunToHf) -> int:
    """Converts a run in a temporary folder (TMPDIR) and uploads that, if it is right."""
    target = push.destination(args.folder)
    hub.check_login(target)  # before the conversion, which may take long
    with tempfile.TemporaryDirectory(prefix="xlstm-jax-") as temporary:
        folder = Path(temporary, "model")
        fields = _write(args, folder)
        agrees = not args.compare or _compare(fields, folder)
        if agrees:
            cfg, _ = hf.open_folder(folder)
            text = card.model_card(
                target.repository,
                cfg,
                folder,
                license_line=fields[LICENSE],
                metrics=_validation_metrics(args.run, args.step),
            )
            (folder / license.CARD).write_text(text)
            pushed = convert.push_hf(args.folder, folder, private=args.private)
            fields = {"uploaded": pushed.address} | fields
            fields["visibility"] = "private" if pushed.private else "public"
    _show(fields, as_json=args.json)
    return DONE if agrees else WRONG_RESULT


def _write(args: RunToHf, folder: Path) -> Fields:
    """Writes the folder of a run, and returns what to print about it."""
    # Before the weights are read; `save` checks again.
    hf.config_of(load_config(args.run, ExperimentConfig).model, args.dtype)
    cfg, params = restore_params(args.run, args.step)
    sizes = {"dtype": args.dtype, "max_shard_bytes": args.max_shard_bytes}
    license_name = save(args.run, folder, cfg.model, params, **sizes)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"parameters": num_params, LICENSE: license_name}


def _validation_metrics(run: Path, step: int | None) -> dict[str, float]:
    """The newest validation metrics of a run, up to a step."""
    records = rundir.read_metrics(run / rundir.METRICS)
    known = [r for r in records if "valid_loss" in r and (step is None or r["step"] <= step)]
    last = known[-1] if known else {}
    wanted = {n: x for n, x in last.items() if n == "step" or n.startswith("valid_")}
    return {name: value for name, value in wanted.items() if isinstance(value, (int, float))}


def save(run: Path, folder: Path, cfg: LMConfig, params: PyTree, **options: Any) -> str:
    """Writes parameters of a run in the layout of transformers, and returns their license.

    `options` are those of `convert.save_hf`.
    """
    tokens_file, tokens = run / SPECIAL_TOKENS, hf.SPECIAL_TOKENS
    if tokens_file.exists():
        where = quote_path(tokens_file)
        tokens = hf.check_special_tokens(read_json(tokens_file), cfg.vocab_size, where)
    convert.save_hf(folder, cfg, params, special_tokens=tokens, **options)
    if locate.has_tokenizer(run / rundir.TOKENIZER):
        locate.copy_files(run / rundir.TOKENIZER, folder)
    if license.copied_file(run):
        return license.copy(run, folder)
    return "none: the weights were trained in this run; choose one"


def _compare(fields: Fields, folder: Path) -> bool:
    """Whether the logits of a folder are those of transformers; adds the comparison."""
    try:
        fields["logits"] = result = compare.with_transformers(folder)
    except compare.TransformersError as error:
        fields["logits"] = f"not compared: {error}"
        return True
    return result.agrees


def _show(fields: Fields, *, as_json: bool) -> None:
    if as_json:
        license_name = fields.pop(LICENSE)
        console.print_json(fields | {"license": license_name})
        return
    texts = {}
    for name, value in fields.items():
        if isinstance(value, compare.Comparison):
            difference, _, versions = value
            value = f"differ from those of {versions} by {difference:.1e} of the largest"
        texts[name] = f"{value:,}" if isinstance(value, int) else value
    console.print_fields(texts)


CONVERSIONS = {"hf-to-run": _hf_to_run, "run-to-hf": _run_to_hf}
"""Name of a conversion -> its function."""
