"""`xlstm-jax evaluate MODEL...`: perplexity, bits per byte and tasks of trained models."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.cli import console, evaluate_tables, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError, check_range, load_config
from xlstm_jax.convert import remote
from xlstm_jax.data import tokenizers
from xlstm_jax.data.config import DataConfig, Split
from xlstm_jax.data.loader import load, load_all
from xlstm_jax.errors import quote, quote_path
from xlstm_jax.evaluate import by_domain, by_frequency, by_position, perplexity, wins
from xlstm_jax.evaluate.domains import find_domains
from xlstm_jax.evaluate.frequency import EDGES, check_edges, count_tokens
from xlstm_jax.evaluate.lengths import check_length, with_cache_size
from xlstm_jax.evaluate.plots import check_format, plot
from xlstm_jax.evaluate.results import Evaluation
from xlstm_jax.generate import prepare_params
from xlstm_jax.modules.lm import LM
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.train import checkpoint, models, rundir
from xlstm_jax.train.config import ExperimentConfig, TrainConfig, check_vocabulary

WINDOW = 2048
"""Tokens per window of documents of domains, as in PALOMA, where --seq-len does not say."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(options.ModelCommand):
    """Measures perplexity and bits per byte on a split of the data, and tasks.

    Several models are compared on the data of the first run among them. With --domains or --tasks,
    perplexity is measured only if --source, --split, --by-position or --by-frequency is given.
    """

    models: options.ModelSources  # runs, folders of transformers, or hf://ORG/NAME[@REVISION]
    split: Split | None = None  # split to evaluate; None: "valid", or all of --source
    source: str | None = None  # built-in corpus, text file or folder; None: as in training
    pattern: str | None = None  # files of a folder to read; None: as in training
    seq_len: int | None = None  # tokens per window; None: as in training, 2048 for --domains
    batch_size: int | None = None  # windows per batch; None: as in training
    max_batches: int | None = None  # evaluate this many batches, evenly spaced; None: all
    segment_len: int | None = None  # tokens per forward pass, with the state carried; None: all
    cache_size: int | None = None  # tokens that attention sees; None: as in training
    by_position: bool = False  # also the loss at each range of positions in the window
    by_frequency: bool = False  # also the loss by the count of the token in the training split
    edges: tuple[int, ...] = EDGES  # first count of each bucket of --by-frequency
    domains: Path | None = None  # folder with one subfolder or file per domain
    tasks: tuple[str, ...] = ()  # tasks of lm-eval, or in --task-path
    task_path: Path | None = None  # folder with task files, NAME.yaml
    num_fewshot: int | None = None  # examples before each question; None: as the task says
    limit: int | None = None  # documents per task; None: all
    plot: Path | None = None  # picture to write: .png, .pdf or .svg
    json: bool = False  # print the results as JSON
    step: int | None = None  # step of the checkpoint of runs; None: the newest
    ema: bool = False  # use the moving average of the parameters of runs, of train.ema_decay
    weights: options.Weights | None = None  # as in `generate`; None: float32

    def measures_loss(self) -> bool:
        """Whether perplexity is measured, on the data of a run or on --source."""
        asks = self.by_position or self.by_frequency or self.source or self.split
        return bool(asks) or not (self.domains or self.tasks)


_DATA = ("source", "pattern", "seq_len", "batch_size")  # options that replace those of `DataConfig`


def run(argv: list[str]) -> int:
    """Runs `evaluate`; raises ConfigError if an option, a model or the data are invalid."""
    args = options.parse("evaluate", Evaluate, argv)
    with console.output_to_stderr():
        tasks = _check(args)
        data = _data_of_first_run(args.models) if len(args.models) > 1 else None
        with compiled_programs():
            evaluations = [_evaluate(args, source, data, tasks) for source in args.models]
        if args.plot is not None:
            plot(evaluations, args.plot)
    comparisons = [
        {"model": a.model, "over": b.model, **wins(a.domains, b.domains)._asdict()}
        for a, b in itertools.combinations(evaluations, 2)
        if a.domains
    ]
    if args.json:
        results: dict[str, Any] = {"models": [e.to_json() for e in evaluations]}
        console.print_json(results | ({"wins": comparisons} if comparisons else {}))
        return DONE
    evaluate_tables.show(evaluations, comparisons)
    if args.plot is not None:
        console.write("\n")
        console.print_fields({"written": quote_path(args.plot)})
    return DONE


def _check(args: Evaluate) -> Any:
    """Checks what can be checked before a model is loaded; returns the tasks, if any."""
    for name in ("max_batches", "segment_len", "cache_size"):
        check_range(name, getattr(args, name), "at least 1", "leave it out")
    # Those of the data are named as in a config.
    for name in ("seq_len", "batch_size"):
        check_range(f"data.{name}", getattr(args, name), "at least 1", "leave it out")
    check_edges(args.edges)
    if not args.models:
        raise ConfigError(
            "`xlstm-jax evaluate` needs MODEL, a run, a folder of transformers or hf://; name one."
        )
    if not args.tasks and (args.task_path, args.num_fewshot, args.limit) != (None, None, None):
        raise ConfigError(
            "--task-path, --num-fewshot and --limit need --tasks with the names of tasks; add it."
        )
    if args.plot is not None:
        check_format(args.plot)
        options.check_out(args.plot, "--plot")
    if args.domains is not None:
        find_domains(args.domains)
    tasks = None
    if args.tasks:
        from xlstm_jax.evaluate.tasks import Tasks  # imports lm-eval, which takes seconds

        tasks = Tasks(args.tasks, args.task_path, num_fewshot=args.num_fewshot, limit=args.limit)
    paths: list[Path] = []
    for source in args.models:  # models of the hub are downloaded here
        _check_exists(source, args)
        paths.append(remote.find(source).resolve())
        if paths[-1] in paths[:-1]:
            raise ConfigError(f"models must differ, got {quote(source)} twice; name it once.")
    return tasks


def _check_exists(source: str, args: Evaluate) -> None:
    """Raises the error of `models.load`, before minutes of evaluation of another model."""
    path = remote.find(source)
    # A function of `os.path`, which is False for a path that is too long.
    if not os.path.isdir(path) or (rundir.is_run(path) and not checkpoint.steps(path)):
        models.load(source, args.step, ema=args.ema)


def _data_of_first_run(sources: Sequence[str]) -> DataConfig | None:
    """The data that models are evaluated on without --source; None without a run."""
    paths = map(remote.find, sources)
    run_dir = next((path for path in paths if rundir.is_run(path)), None)
    return None if run_dir is None else load_config(run_dir, ExperimentConfig).data


def _evaluate(args: Evaluate, source: str, data: DataConfig | None, tasks: Any) -> Evaluation:
    """The requested results of one model."""
    model = models.load(source, args.step, ema=args.ema)
    assert model.tokenizer is not None  # as commands need one
    if data is None and model.is_run:
        data = model.cfg.data
    cfg = model.cfg.model
    if args.cache_size is not None:
        cfg = with_cache_size(cfg, args.cache_size)
    if args.seq_len is not None:
        check_length(cfg, "--seq-len", args.seq_len)
    lm, variables = LM(cfg), {"params": model.params}
    if args.weights is not None:
        variables = prepare_params(lm, variables, dtype=args.weights)
    results: dict[str, Any] = {}
    if args.measures_loss():
        if data is None:
            models.require_data(model, source, args.source)
        results |= _losses(args, model, lm, variables, data)
    batch_size = args.batch_size or (data or DataConfig()).batch_size
    tokenizer = tokenizers.get(model.tokenizer)
    if args.domains is not None:
        seq_len = args.seq_len or WINDOW
        results["domains"] = by_domain(
            lm, variables, tokenizer, args.domains, seq_len=seq_len, batch_size=batch_size
        )
    if tasks is not None:
        from xlstm_jax.evaluate.harness import XLSTM  # imports lm-eval, which takes seconds

        sizes = {"batch_size": batch_size, "max_length": args.seq_len}
        results["tasks"] = tasks.run(XLSTM(lm, variables, tokenizer, **sizes))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return Evaluation(model=source, num_params=num_params, **results)


def _losses(
    args: Evaluate, model: models.Model, lm: LM, variables: Any, data_of_run: DataConfig | None
) -> dict[str, Any]:
    """Perplexity, and the loss by position and frequency."""
    data = dataclasses.replace(data_of_run or DataConfig(), tokenizer=model.tokenizer)
    overrides: dict[str, Any] = {
        name: value for name in _DATA if (value := getattr(args, name)) is not None
    }
    if args.source is not None:  # also replaces a mixture
        overrides |= {"sources": {}, "weights": {}, "weight_schedule": ()}
    scored = dataclasses.replace(data, **overrides)
    # A given text is only used for validation, so all of it is evaluated.
    split = args.split or ("valid" if args.source is None else None)
    check_length(lm.cfg, "data.seq_len", scored.seq_len)
    examples = load(scored, split) if split else load_all(scored)
    # Without what concerns training only.
    without_training = ExperimentConfig(
        name=model.cfg.name, model=lm.cfg, data=scored, train=TrainConfig()
    )
    check_vocabulary(without_training, examples)
    measured: Any = lm, variables, examples
    settings: dict[str, Any] = {
        "batch_size": scored.batch_size,
        "max_batches": args.max_batches,
        "document_resets": model.cfg.train.document_resets,
    }
    segments = {} if args.segment_len is None else {"segment_len": args.segment_len}
    names = scored.sources or (scored.source,)
    scope = f"{', '.join(map(quote_path, names))}, {split or 'all splits'}"
    results: dict[str, Any] = {
        "data": f"{scope}, windows of {scored.seq_len} tokens",
        "perplexity": perplexity(*measured, **settings, **segments),
    }
    if args.by_position:
        results["by_position"] = by_position(*measured, **settings, **segments)
    if args.by_frequency:
        # The training data of the run, for any evaluated data; without a run, those of --source.
        counted = load(scored if data_of_run is None else data, "train")
        counts = count_tokens(counted, lm.cfg.vocab_size)
        results["by_frequency"] = by_frequency(
            *measured, counts=counts, edges=args.edges, **settings, **segments
        )
    return results
