"""Does fine-tuning a checkpoint of transformers on conversations teach it to answer, with LoRA too?

Expected: both methods lower the loss of validation answers by more than half and answer most of
these questions exactly; LoRA leaves the base weights bit-identical and needs less than a fifth of
the optimizer state; `transformers` computes the logits of the merged model, and `peft` those of the
adapters, up to rounding.

    python experiments/fine_tuning.py --peer PYTHON    # an interpreter with transformers and peft

The script trains a small model of large blocks and a BPE on the library of Python, and exports it
in the layout of transformers; `--base FOLDER` takes another such folder, with its tokenizer. The
conversations ask for facts from a table, in several phrasings, and for a word of a list. Validation
questions are new combinations of known facts and known phrasings.

`xlstm-jax train experiments/fine_tuning.py` trains only the base, on bytes.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from experiments import record
from experiments.benchmarks import measure
from xlstm_jax import convert, cpu
from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.data import DataConfig, chat, corpora, load, tokenizers
from xlstm_jax.data.prepare import PrepareConfig, prepare
from xlstm_jax.data.train_tokenizer import train_bpe
from xlstm_jax.modules import LM, LargeConfig, LMConfig
from xlstm_jax.train import ExperimentConfig, LoraConfig, TrainConfig, eval_params, fit

PEER = pathlib.Path(__file__).with_name("fine_tuning_peer.py")
PACKAGES = (*measure.PACKAGES, "safetensors", "tokenizers")
VOCAB_SIZE = 1024
MAX_ANSWER = 8  # tokens

# Answers are targets, with the space before them and the end of the conversation after them.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Answer:{% generation %} "
    "{{ m['content'] }}{% endgeneration %}{% else %}Question: {{ m['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
PHRASINGS = (
    "What is the color of {}?",
    "Which color has {}?",
    "Tell me the color of {}.",
    "If you look at {}, which color do you see?",
    "I forgot what color {} has.",
    "Name the color of {}.",
)
COLORS = "red green blue white black yellow brown purple".split()
NAMES = "apple river stone tower horse candle mirror window garden silver rocket".split()
NAMES += "violin bottle carpet pencil basket anchor hammer ladder saddle pillow".split()
LISTS = ("The first word of {}?", "The last word of {}?")

CPU = ExperimentConfig(
    name="fine_tuning",
    model=LMConfig(
        vocab_size=VOCAB_SIZE,
        dim=128,
        pattern="MM",
        large=LargeConfig(num_heads=4, qk_dim=64, ffn_dim=256, gate_soft_cap=15.0),
        final_norm="rms",
        final_norm_eps=1e-6,
        logit_soft_cap=30.0,
    ),
    data=DataConfig(seq_len=128, batch_size=16),
    train=TrainConfig(
        steps=200, lr=3e-3, log_every=20, eval_every=100, eval_batches=10, checkpoint_every=0
    ),
)
SMOKE = dataclasses.replace(
    CPU,
    model=dataclasses.replace(
        CPU.model, dim=32, large=LargeConfig(num_heads=2, qk_dim=16, ffn_dim=32)
    ),
    data=dataclasses.replace(CPU.data, seq_len=64, batch_size=4),
    train=dataclasses.replace(CPU.train, steps=4, log_every=2, eval_every=4, eval_batches=2),
)
SIZES = {"smoke": SMOKE, "cpu": CPU}
TUNING_STEPS = {"smoke": 4, "cpu": 300}
LEARNING_RATES = {"full": 3e-3, "lora": 1e-2}
LORA = LoraConfig(rank=8, alpha=16.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(measure.Arguments):
    """What to run, and where."""

    size: Literal["smoke", "cpu"] = "cpu"
    out: pathlib.Path | None = record.RESULTS / "fine_tuning.json"  # the plot is written next to it
    runs: pathlib.Path = pathlib.Path("runs/fine_tuning")  # emptied first
    base: pathlib.Path | None = None  # folder of transformers with its tokenizer; None: train one
    peer: str | None = None  # interpreter with torch, transformers and peft; None: not compared


def config(size: str = "cpu") -> ExperimentConfig:
    """The run that trains the base, with bytes as tokens.

    Raises:
        ConfigError: `size` is unknown.
    """
    record.check_size(size, SIZES)
    return SIZES[size]


def train_base(cfg: ExperimentConfig, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint folder of transformers with weights, tokenizer and chat template."""
    corpus = corpora.read_corpus(cfg.data.source)
    texts = [document.data for document in itertools.islice(corpus.documents["train"], 200)]
    out = folder / "base"
    out.mkdir(parents=True)
    # Names and colors become single tokens.
    chats = [json.dumps(chat).encode() for chat in itertools.chain(*conversations().values())]
    train_bpe([*texts, *chats], VOCAB_SIZE, out)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    data = dataclasses.replace(cfg.data, tokenizer=str(out))
    cfg = dataclasses.replace(cfg, name="base", data=data)
    state = fit(cfg, folder / "base_run", console=True).state
    eos = tokenizers.get(str(out)).eos_id
    tokens = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    convert.save_hf(folder / "weights", cfg.model, state.params, special_tokens=tokens)
    for file in (folder / "weights").iterdir():
        file.rename(out / file.name)
    return out


def conversations() -> dict[str, list[dict[str, Any]]]:
    """The conversations of the splits train and valid."""
    rng = random.Random(0)
    facts = {name: rng.choice(COLORS) for name in NAMES}
    pairs = [
        (phrasing.format(f"the {name}"), color)
        for phrasing, (name, color) in itertools.product(PHRASINGS, facts.items())
    ]
    for _ in range(400):
        words = rng.sample(NAMES, rng.randint(2, 4))
        for question, word in zip(LISTS, (words[0], words[-1]), strict=True):
            pairs.append((question.format(" ".join(words)), word))
    pairs = list(dict.fromkeys(pairs))
    rng.shuffle(pairs)
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    return {"train": chats[100:], "valid": chats[:100]}


def prepare_chat(base: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The conversations, tokenized, with a mask of the answers; as `data prepare --chat`."""
    for split, chats in conversations().items():
        (folder / "chat" / split).mkdir(parents=True)
        text = "".join(json.dumps(chat) + "\n" for chat in chats)
        (folder / "chat" / split / "conversations.jsonl").write_text(text)
    cfg = PrepareConfig(source=str(folder / "chat"), tokenizer=str(base), chat=True)
    prepare(cfg, folder / "tokens", num_workers=1)
    return folder / "tokens"


def fine_tune(
    cfg: ExperimentConfig,
    kind: str,
    steps: int,
    base: pathlib.Path,
    tokens: pathlib.Path,
    runs: pathlib.Path,
) -> tuple[dict[str, Any], Any, Any]:
    """Trains "full" or "lora"; returns its record, the parameters of the model and the state's."""

    adapters = LORA if kind == "lora" else LoraConfig()
    every = cfg.train.log_every
    train = dataclasses.replace(cfg.train, steps=steps, lr=LEARNING_RATES[kind], eval_every=every)
    data = dataclasses.replace(cfg.data, source=str(tokens), packing="best_fit", tokenizer="byte")
    cfg = dataclasses.replace(
        cfg, name=kind, data=data, train=train, lora=adapters, init_from=str(base)
    )
    records: list[dict[str, Any]] = []
    start = time.perf_counter()
    result = fit(
        cfg,
        runs / kind,
        console=True,
        on_metrics=lambda step, record: records.append({"step": step} | record),
    )
    sizes = json.loads((runs / kind / "run.json").read_text())
    params = eval_params(cfg, result.state.params, result.state.opt_state)
    record = {
        "config": to_dict(cfg),
        "seconds": round(time.perf_counter() - start, 1),
        **{name: x for name, x in sizes.items() if name.endswith(("_bytes", "_params"))},
        "loss": [[r["step"], r["loss"]] for r in records if "loss" in r],
        "valid_loss": [[r["step"], r["valid_loss"]] for r in records if "valid_loss" in r],
    }
    return record, params, result.state.params


def answers(model: LMConfig, params: Any, base: pathlib.Path) -> float:
    """Share of the validation questions whose greedy answer is exact."""
    from xlstm_jax.generate import generate

    tokenizer, template = tokenizers.get(str(base)), chat.load(str(base))
    chats = [one["messages"] for one in conversations()["valid"]]
    prompts = []
    for messages in chats:
        ids, is_target, _ = template.encode(tokenizer, messages, "validation questions")
        prompts.append(ids[: is_target.argmax()].tolist())
    generated = generate(
        LM(model),
        {"params": params},
        prompts,
        max_new_tokens=MAX_ANSWER,
        stop=(tokenizer.eos_id,),
    ).tokens
    texts = [tokenizer.decode(list(_until(ids, tokenizer.eos_id))) for ids in generated]
    expected = [f" {messages[-1]['content']}" for messages in chats]
    return float(np.mean([a == b for a, b in zip(texts, expected, strict=True)]))


def _until(ids: Sequence[int], end: int) -> Iterator[int]:
    return itertools.takewhile(lambda token: token != end, map(int, ids))


def digest(params: Any) -> str:
    """SHA-256 of the bits of all parameters."""
    import jax

    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def compare(
    python: str,
    base: pathlib.Path,
    model: LMConfig,
    params: Any,
    adapters: Any,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Differences of the logits of transformers and peft from ours, relative to the largest."""
    import jax.numpy as jnp

    from xlstm_jax.train import lora

    convert.save_hf(folder / "merged", model, params)
    lora.save(folder / "adapter", adapters, LORA)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 64))
    logits = LM(model).apply({"params": params}, jnp.asarray(tokens))[0]
    np.savez(folder / "logits.npz", tokens=tokens, logits=np.asarray(logits))
    command = [python, str(PEER), str(base), str(folder)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise ConfigError(
            f"peer must name an interpreter with torch, transformers and peft, got {python!r}, "
            "which failed; its error is above."
        )
    return json.loads(process.stdout.splitlines()[-1])


def main(args: Arguments) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    from xlstm_jax.evaluate import perplexity

    cfg, start = config(args.size), time.perf_counter()
    shutil.rmtree(args.runs, ignore_errors=True)
    base = train_base(cfg, args.runs) if args.base is None else args.base
    tokens = prepare_chat(base, args.runs)
    model, params = convert.load_hf(base)
    cfg = dataclasses.replace(cfg, model=model)
    data = dataclasses.replace(cfg.data, source=str(tokens), packing="best_fit")
    before = perplexity(LM(model), {"params": params}, load(data, "valid"))
    result: dict[str, Any] = measure.run_info("fine_tuning", PACKAGES) | {
        "size": args.size,
        "command": f"python experiments/fine_tuning.py --size {args.size}"
        + (" --peer PYTHON" if args.peer else ""),
        "before": {
            "valid_loss": before.nats_per_token,
            "exact_answers": answers(model, params, base),
        },
        "peer": "not measured",
    }
    for kind in LEARNING_RATES:
        result[kind], tuned, state_params = fine_tune(
            cfg, kind, TUNING_STEPS[args.size], base, tokens, args.runs
        )
        result[kind]["exact_answers"] = answers(model, tuned, base)
        if kind == "lora":
            unchanged = {name: tree for name, tree in state_params.items() if name != "lora"}
            result["base_is_unchanged"] = digest(unchanged) == digest(params)
            if args.peer is not None:
                adapters = state_params["lora"]
                result["peer"] = compare(args.peer, base, model, tuned, adapters, args.runs)
    result["outcome"] = outcome(result)
    result["seconds"] = round(time.perf_counter() - start, 1)
    measure.write(args.out, result)
    if args.out is not None:
        plot(result, args.out.with_suffix(".png"))
    return record.print_outcome(args.size, result["outcome"])


def outcome(result: dict[str, Any]) -> dict[str, bool | None]:
    """Whether each expectation holds; None: not measured."""
    expectations: dict[str, bool | None] = {}
    for kind in LEARNING_RATES:
        last = result[kind]["valid_loss"][-1][1]
        expectations[f"{kind}: less than half of the loss"] = (
            last < result["before"]["valid_loss"] / 2
        )
        expectations[f"{kind}: most answers are exact"] = result[kind]["exact_answers"] > 0.5
    expectations["LoRA leaves the base bit-identical"] = result["base_is_unchanged"]
    full, adapters = (result[kind]["optimizer_bytes"] for kind in ("full", "lora"))
    expectations["LoRA: less than a fifth of the optimizer state"] = adapters < full / 5
    peer = result["peer"]
    for name in ("transformers", "peft"):
        measured = isinstance(peer, dict)
        expectations[f"{name} computes the same logits"] = peer[name] < 1e-4 if measured else None
    return expectations


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Plots the loss of answers over steps."""
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    labels = {"full": "all parameters", "lora": f"LoRA, rank {LORA.rank}"}
    for color, (kind, label) in zip(("C0", "C3"), labels.items(), strict=True):
        valid = [[0, result["before"]["valid_loss"]], *result[kind]["valid_loss"]]
        axes.plot(*zip(*result[kind]["loss"], strict=True), color=color, alpha=0.35)
        exact = f"{result[kind]['exact_answers']:.0%} exact"
        axes.plot(*zip(*valid, strict=True), "o-", ms=3, color=color, label=f"{label}: {exact}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token of the answer")
    axes.set_title("Fine-tuning on conversations: validation (points) and training loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    measure.run(main, Arguments, __doc__)
