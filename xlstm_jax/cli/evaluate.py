"""`xlstm-jax evaluate MODEL`: perplexity and bits per byte of a trained model."""

import dataclasses
import math
from typing import Any

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.data.config import Split
from xlstm_jax.data.loader import load, load_all
from xlstm_jax.errors import quote_path
from xlstm_jax.evaluate import by_position, perplexity
from xlstm_jax.modules.lm import LM
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.train import models
from xlstm_jax.train.config import check_vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(options.ModelCommand):
    """Measures perplexity and bits per byte on a split of the data."""

    model: options.ModelSource  # a run, a folder of transformers, or hf://ORG/NAME[@REVISION]
    split: Split | None = None  # split to evaluate; None: "valid", or all of --source
    source: str | None = None  # built-in corpus, text file or folder; None: as in training
    pattern: str | None = None  # files of a folder to read; None: as in training
    seq_len: int | None = None  # tokens per window; None: as in training
    batch_size: int | None = None  # windows per batch; None: as in training
    max_batches: int | None = None  # evaluate this many batches, evenly spaced; None: all
    by_position: bool = False  # also print the loss at each range of positions in the window
    step: int | None = None  # step of the checkpoint; None: the newest
    ema: bool = False  # use the moving average of the parameters, of train.ema_decay


_DATA = ("source", "pattern", "seq_len", "batch_size")  # options that replace those of `DataConfig`


def run(argv: list[str]) -> int:
    """Runs `evaluate`; raises ConfigError if an option, the model or the data is invalid."""
    args = options.parse("evaluate", Evaluate, argv)
    model = models.load(args.model, args.step, ema=args.ema)
    models.require_data(model, args.model, args.source)
    cfg = model.cfg
    data_options = {name: getattr(args, name) for name in _DATA}
    overrides: dict[str, Any] = {
        name: value for name, value in data_options.items() if value is not None
    }
    if args.source is not None:  # in place of a mixture, too
        overrides |= {"sources": {}, "weights": {}, "weight_schedule": ()}
    overrides["tokenizer"] = model.tokenizer
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **overrides))
    # All of a given text is held-out data, so all of it is evaluated.
    split = args.split or ("valid" if args.source is None else None)
    examples = load(cfg.data, split) if split else load_all(cfg.data)
    check_vocabulary(cfg, examples)
    inputs = LM(cfg.model), {"params": model.params}, examples
    settings = {
        "batch_size": cfg.data.batch_size,
        "max_batches": args.max_batches,
        "document_resets": cfg.train.document_resets,
    }
    with compiled_programs():
        result = perplexity(*inputs, **settings)
        names = cfg.data.sources or (cfg.data.source,)
        scope = f"{', '.join(map(quote_path, names))}, {split or 'all splits'}"
        fields = {"data": f"{scope}, windows of {cfg.data.seq_len} tokens"}
        if result.bits_per_byte is not None:
            fields["bits per byte"] = f"{result.bits_per_byte:.4f}"
        fields["nats per token"] = f"{result.nats_per_token:.4f}"
        fields["perplexity"] = f"{math.exp(result.nats_per_token):.4f}"
        fields["tokens"] = f"{result.num_tokens:,}"
        console.print_fields(fields)
        if args.by_position:
            buckets = [
                [f"{b.start}-{b.stop - 1}", f"{b.nats_per_token:.4f}", f"{b.num_tokens:,}"]
                for b in by_position(*inputs, **settings)
            ]
            console.write("\n")
            console.print_table(["position", "nats per token", "tokens"], buckets)
    return DONE
