"""`xlstm-jax evaluate RUN`: how well a trained model predicts held-out data."""

import dataclasses
import math

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.data.config import Split
from xlstm_jax.data.loader import load
from xlstm_jax.evaluate import by_position, perplexity
from xlstm_jax.modules.lm import LM
from xlstm_jax.train.checkpoint import restore_params
from xlstm_jax.train.config import check_vocabulary
from xlstm_jax.train.rundir import compiled_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(options.ModelCommand):
    """Perplexity and bits per byte over a whole split, each token counted once."""

    run: options.RunPath  # the folder of a run
    split: Split = "valid"
    source: str | None = None  # other data than the run's: a name, a file or a folder
    seq_len: int | None = None  # another window than the run's, longer ones included
    batch_size: int | None = None  # another batch than the run's; changes speed and memory
    max_batches: int | None = None  # only so many, spread evenly over the split
    by_position: bool = False  # also the loss by position in the window
    step: int | None = None  # of the checkpoint; None: the newest


def run(args: list[str]) -> int:
    """Raises ConfigError if an option, the run or the data cannot be used."""
    chosen = options.parse("evaluate", Evaluate, args)
    cfg, params = restore_params(chosen.run, chosen.step)
    changes = {name: getattr(chosen, name) for name in ("source", "seq_len", "batch_size")}
    given = {name: value for name, value in changes.items() if value is not None}
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **given))
    examples = load(cfg.data, chosen.split)
    check_vocabulary(cfg, examples)
    arguments = LM(cfg.model), {"params": params}, examples
    how = {
        "batch_size": cfg.data.batch_size,
        "max_batches": chosen.max_batches,
        "document_resets": cfg.train.document_resets,
    }
    with compiled_programs(chosen.run):
        measured = perplexity(*arguments, **how)
        rows = {"data": f"{cfg.data.source}, {chosen.split}, windows of {cfg.data.seq_len} tokens"}
        if measured.bits_per_byte is not None:
            rows["bits per byte"] = f"{measured.bits_per_byte:.4f}"
        rows["nats per token"] = f"{measured.nats_per_token:.4f}"
        rows["perplexity"] = f"{math.exp(measured.nats_per_token):.4f}"
        rows["tokens"] = f"{measured.num_tokens:,}"
        console.facts(rows)
        if chosen.by_position:
            buckets = [
                [f"{b.start}-{b.stop - 1}", f"{b.nats_per_token:.4f}", f"{b.num_tokens:,}"]
                for b in by_position(*arguments, **how)
            ]
            console.say("\n")
            console.table(["position", "nats per token", "tokens"], buckets)
    return DONE
