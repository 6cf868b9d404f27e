"""`xlstm-jax generate RUN --prompt TEXT`: continues a text, as it is being made."""

import dataclasses
import itertools

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import ConfigError
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import Sampler
from xlstm_jax.generate.text import stream_text
from xlstm_jax.modules.lm import LM
from xlstm_jax.train.checkpoint import restore_params
from xlstm_jax.train.rundir import compiled_programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(options.ModelCommand):
    """Continues a text with a trained model, until its document ends."""

    run: options.RunPath  # the folder of a run
    prompt: str  # the text to continue
    max_new_tokens: int = 256
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # of the k likeliest tokens only
    top_p: float | None = None  # of the fewest tokens that hold this probability
    min_p: float | None = None  # of tokens with this share of the largest probability
    repetition_penalty: float | None = None  # above 1 discourages tokens that occurred
    stop: tuple[str, ...] = ()  # texts that end the answer
    seed: int = 0
    step: int | None = None  # of the checkpoint; None: the newest


def run(args: list[str]) -> int:
    """Raises ConfigError if an option or the run cannot be used."""
    chosen = options.parse("generate", Generate, args)
    if not chosen.prompt:
        raise ConfigError("--prompt must be the text to continue, got ''; give it a character.")
    likeliest = chosen.temperature == 0
    sampler = Sampler(
        repetition_penalty=chosen.repetition_penalty,
        temperature=1.0 if likeliest else chosen.temperature,
        top_k=1 if likeliest else chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
    )
    cfg, params = restore_params(chosen.run, chosen.step)
    with compiled_programs(chosen.run):
        answer = stream_text(
            LM(cfg.model),
            {"params": params},
            tokenizers.get(cfg.data.tokenizer),
            chosen.prompt,
            max_new_tokens=chosen.max_new_tokens,
            sampler=sampler,
            key=jax.random.key(chosen.seed),
            stop=chosen.stop,
        )
        for part in itertools.chain([chosen.prompt], answer, ["\n"]):
            console.say(part)
    return DONE
