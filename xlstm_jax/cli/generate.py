"""`xlstm-jax generate MODEL --prompt TEXT`: streams a continuation of a text."""

import dataclasses
import itertools

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import Sampler
from xlstm_jax.generate.text import stream_text
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.modules.lm import LM
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.train import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(options.ModelCommand):
    """Continues a text with a trained model until the end of the document."""

    model: options.ModelSource  # a run, a folder of transformers, or hf://ORG/NAME[@REVISION]
    prompt: str  # the text to continue
    max_new_tokens: int = 256  # limit of the continuation
    temperature: float = 0.8  # 0: greedy decoding
    top_k: int | None = None  # sample from the k most likely tokens only
    top_p: float | None = None  # sample from the fewest tokens with this total probability
    min_p: float | None = None  # sample from tokens with this share of the top probability
    repetition_penalty: float | None = None  # above 1: makes repeated tokens less likely
    stop: tuple[str, ...] = ()  # strings that end the continuation
    seed: int = 0  # any integer; of the sampler
    step: int | None = None  # checkpoint of a run to load; None: the newest
    ema: bool = False  # of a run: use the moving average of the parameters, of train.ema_decay


def run(argv: list[str]) -> int:
    """Runs `generate`; raises ConfigError if an option or the model is invalid."""
    args = options.parse("generate", Generate, argv)
    is_greedy = args.temperature == 0
    sampler = Sampler(
        repetition_penalty=args.repetition_penalty,
        temperature=1.0 if is_greedy else args.temperature,
        top_k=1 if is_greedy else args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )
    model = models.load(args.model, args.step, ema=args.ema)
    assert model.tokenizer is not None  # as it needs one
    with compiled_programs():
        continuation = stream_text(
            LM(model.cfg.model),
            {"params": model.params},
            tokenizers.get(model.tokenizer),
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            sampler=sampler,
            key=random_key(args.seed),
            stop=args.stop,
        )
        for part in itertools.chain([args.prompt], continuation, ["\n"]):
            console.write(part)
    return DONE
