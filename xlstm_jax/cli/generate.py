"""`xlstm-jax generate MODEL --prompt TEXT`: streams a continuation of a text."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from xlstm_jax.cli import console, options, sessions
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.config import check_range
from xlstm_jax.data import tokenizers
from xlstm_jax.generate import Sampler, prepare_params
from xlstm_jax.generate.text import check_stop, stream_text
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.modules.lm import LM
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.train import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(options.ModelCommand):
    """Continues a text with a trained model until the end of the document."""

    model: options.ModelSource  # a run, a folder of transformers, or hf://ORG/NAME[@REVISION]
    prompt: str | None = None  # the text to continue; with --chat, the first message
    session: Path | None = None  # continue what this file stores, if it exists, and store it again
    chat: bool = False  # answer messages, lines of the input, by the chat template of the tokenizer
    max_new_tokens: int = 256  # limit of the continuation
    temperature: float = 0.8  # 0: greedy decoding
    top_k: int | None = None  # sample from the k most likely tokens only
    top_p: float | None = None  # sample from the fewest tokens with this total probability
    min_p: float | None = None  # sample from tokens with this share of the top probability
    repetition_penalty: float | None = None  # above 1: makes repeated tokens less likely
    stop: tuple[str, ...] = ()  # strings that end the continuation
    weights: options.Weights | None = None  # their precision; None: that of activations
    seed: int = 0  # any integer; of the sampler
    step: int | None = None  # checkpoint of a run to load; None: the newest
    ema: bool = False  # of a run: use the moving average of the parameters, of train.ema_decay


def run(argv: list[str]) -> int:
    """Runs `generate`; raises ConfigError if an option or the model is invalid."""
    args = options.parse("generate", Generate, argv)
    sessions.check(args.session, args.prompt, is_chat=args.chat)
    check_range("--max-new-tokens", args.max_new_tokens, "at least 1", "256 is the default")
    check_stop(args.stop)
    is_greedy = args.temperature == 0
    sampler = Sampler(
        repetition_penalty=args.repetition_penalty,
        temperature=1.0 if is_greedy else args.temperature,
        top_k=1 if is_greedy else args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
    )
    model = models.load(args.model, args.step, ema=args.ema, unstacked=True)
    assert model.tokenizer is not None  # as it needs one
    lm = LM(model.cfg.model)
    # The parameters are not used again, and a second copy may not fit in memory.
    variables = prepare_params(lm, {"params": model.params}, dtype=args.weights, consume=True)
    inputs = lm, variables, tokenizers.get(model.tokenizer)
    settings: dict[str, Any] = dict(max_new_tokens=args.max_new_tokens, sampler=sampler)
    key = random_key(args.seed)
    with compiled_programs():
        if args.chat:
            session = sessions.load_or_start(args.session, *inputs)
            chat = args.session, model.tokenizer, args.prompt
            sessions.talk(session, *chat, key, stop=args.stop, **settings)
        elif args.session is not None:
            session = sessions.load_or_start(args.session, *inputs)
            text = args.session, args.prompt
            sessions.continue_text(session, *text, key, stop=args.stop, **settings)
        else:
            assert args.prompt is not None  # `sessions.check`
            parts = stream_text(*inputs, args.prompt, key=key, stop=args.stop, **settings)
            for part in itertools.chain([args.prompt], parts, ["\n"]):
                console.write(part)
    return DONE
