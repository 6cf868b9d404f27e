"""How well do language models answer tasks that they were not trained for?

Published, for 1.3B parameters trained on 300B tokens, mean accuracy of six tasks without examples:
xLSTM[1:0] 58.48 %, Mamba 58.41 %, xLSTM[7:1] 58.10 %, Llama 56.99 %, RWKV-4 54.78 %. The tasks are
those of the EleutherAI harness: LAMBADA (OpenAI), PIQA, ARC-easy and WinoGrande by accuracy,
HellaSwag and ARC-challenge by the accuracy of choices normalized by their length. The paper takes
the best of float32, bfloat16 and mixed precision; here parameters are float32 and activations have
the dtype of the model, which is in the record.

Expected at the size cpu, with small models trained on source code and 200 questions from validation
code: both choose the line that follows four others with an accuracy above 0.32, two standard errors
above chance (0.25), and guess the last word of a line (LAMBADA's question) in more than 2 %.

    python experiments/downstream.py --size cpu
    python experiments/downstream.py --size paper --models XLSTM LLAMA --task-path TASKS
    xlstm-jax evaluate XLSTM LLAMA --tasks lambada_openai hellaswag piqa arc_easy arc_challenge \\
        winogrande --task-path TASKS                                   # the same figures

MODELS are runs, folders of transformers, or hf://ORG/NAME. Tasks need the extra `eval`; TASKS has
task files whose data are local, where the harness cannot download. `--size paper:FAMILY_SIZE` of
`xlstm-jax train` trains a published model.

Source: Beck et al. 2024, arXiv:2405.04517, table 3. Sizes: smoke (seconds), cpu (minutes), paper
(models of the user).
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import language_models, paloma, record
from experiments.language_models import LABELS
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.data import corpora, tokenizers
from xlstm_jax.evaluate import score_continuations
from xlstm_jax.modules import LM
from xlstm_jax.train import ExperimentConfig, models

TASKS = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}
"""Task of the harness -> metric of the published table."""

ACCURACIES = {
    "rwkv4_125m": (54.72, 23.77, 34.03, 66.00, 47.94, 24.06, 50.91, 41.12),
    "llama_125m": (39.21, 31.54, 34.09, 65.45, 45.33, 23.63, 50.67, 41.78),
    "mamba_125m": (27.76, 34.14, 36.47, 66.76, 48.86, 24.40, 51.14, 43.63),
    "xlstm_1:0_125m": (25.98, 36.52, 36.74, 65.61, 47.81, 24.83, 51.85, 43.89),
    "xlstm_7:1_125m": (26.59, 36.08, 36.75, 66.87, 48.32, 25.26, 51.70, 44.16),
    "rwkv4_350m": (21.57, 36.62, 42.47, 69.42, 54.46, 25.43, 51.22, 46.60),
    "llama_350m": (15.73, 44.19, 44.45, 69.15, 52.23, 26.28, 53.59, 48.32),
    "mamba_350m": (12.83, 46.24, 47.55, 69.70, 55.47, 27.56, 54.30, 50.14),
    "xlstm_1:0_350m": (11.49, 49.33, 48.06, 69.59, 55.72, 26.62, 54.38, 50.62),
    "xlstm_7:1_350m": (12.11, 47.74, 47.89, 71.16, 56.61, 27.82, 53.28, 50.75),
    "rwkv4_760m": (10.98, 47.43, 52.29, 72.69, 58.84, 28.84, 55.41, 52.58),
    "llama_760m": (9.90, 51.41, 52.16, 70.95, 56.48, 28.75, 56.67, 52.74),
    "mamba_760m": (9.24, 50.84, 53.97, 71.16, 60.44, 29.78, 56.99, 53.86),
    "xlstm_1:0_760m": (8.09, 54.78, 55.72, 72.69, 62.75, 32.59, 58.17, 56.12),
    "xlstm_7:1_760m": (8.07, 55.27, 56.12, 72.74, 61.36, 29.61, 56.43, 55.26),
    "rwkv4_1.3b": (9.84, 49.78, 56.20, 74.70, 61.83, 30.63, 55.56, 54.78),
    "llama_1.3b": (7.23, 57.44, 57.81, 73.12, 62.79, 31.74, 59.04, 56.99),
    "mamba_1.3b": (7.41, 55.64, 60.45, 74.43, 66.12, 33.70, 60.14, 58.41),
    "xlstm_1:0_1.3b": (6.86, 57.83, 60.91, 74.59, 64.31, 32.59, 60.62, 58.48),
    "xlstm_7:1_1.3b": (7.04, 56.69, 60.26, 74.92, 65.11, 32.34, 59.27, 58.10),
}
"""FAMILY_SIZE -> published perplexity of LAMBADA, accuracies of `TASKS` in percent, their mean."""

NUM_CHOICES, NUM_QUESTIONS = 4, {"smoke": 4, "cpu": 200}
CONTEXT_BYTES = 160  # at most, of a question
MIN_CHOICE, MIN_WORD = 0.32, 0.02
FAMILIES = paloma.FAMILIES
RESULTS = pathlib.Path(__file__).parent / "results"


class Question(NamedTuple):
    """A context and its continuations, of which the first is right."""

    context: str
    continuations: tuple[str, ...]


def config(size: str = "cpu", model: str = "") -> ExperimentConfig:
    """The run of a model that is evaluated, that of `paloma.config`.

    Raises:
        ConfigError: the size or the model is unknown.
    """
    return paloma.config(size, model)


def validation_lines(corpus: str) -> list[list[str]]:
    """The lines with text of every document of the validation and test splits, in ASCII."""
    documents = corpora.read_corpus(corpus).documents
    texts = (d.data.decode("ascii", "ignore") for d in (*documents["valid"], *documents["test"]))
    lines = [[line + "\n" for line in text.splitlines() if len(line) > 12] for text in texts]
    return [document for document in lines if len(document) > 5]


def questions(corpus: str, count: int) -> Iterator[Question]:
    """Which line follows four others? The other choices are lines of other documents."""
    rng, documents = np.random.default_rng(0), validation_lines(corpus)
    for _ in range(count):
        first, *others = rng.permutation(len(documents))[:NUM_CHOICES].tolist()
        start = int(rng.integers(len(documents[first]) - 4))
        *context, right = documents[first][start : start + 5]
        wrong = [documents[k][int(rng.integers(len(documents[k])))] for k in others]
        yield Question("".join(context)[-CONTEXT_BYTES:], (right, *wrong))


def last_words(corpus: str, count: int) -> Iterator[Question]:
    """Which word ends a line, given the lines before it? The word also occurs before."""
    rng, documents = np.random.default_rng(1), validation_lines(corpus)
    num_questions, tries = 0, 0
    while num_questions < count and tries < 1000 * count:
        tries += 1
        document = documents[int(rng.integers(len(documents)))]
        start = int(rng.integers(len(document) - 4))
        text = "".join(document[start : start + 5])
        match = re.search(r"\b(\w{4,})\W*\n$", text)
        if match is None or match[1] not in text[: match.start(1)]:
            continue
        num_questions += 1
        yield Question(text[: match.start(1)][-CONTEXT_BYTES:], (match[1],))


def score(source: str, corpus: str, count: int) -> dict[str, float]:
    """Accuracy of choices, raw and normalized by bytes; accuracy and perplexity of last words."""
    model = models.load(source)
    assert model.tokenizer is not None  # as `load` demands one
    lm, variables = LM(model.cfg.model), {"params": model.params}
    tokenizer = tokenizers.get(model.tokenizer)

    def scores(question: Question):
        return score_continuations(lm, variables, tokenizer, *question)

    choices = [scores(question) for question in questions(corpus, count)]
    words = [scores(question)[0] for question in last_words(corpus, count)]
    raw = [np.argmax([one.logprob for one in each]) == 0 for each in choices]
    per_byte = [np.argmax([one.logprob / one.num_bytes for one in each]) == 0 for each in choices]
    return {
        "num_questions": len(choices),
        "acc": float(np.mean(raw)),
        "acc_norm": float(np.mean(per_byte)),
        "last_word_acc": float(np.mean([one.is_greedy for one in words])),
        "last_word_perplexity": math.exp(-np.mean([one.logprob for one in words])),
    }


def run_tasks(source: str, task_path: pathlib.Path | None) -> dict[str, Any]:
    """The published columns of one model, in percent, and all metrics of the harness."""
    from xlstm_jax.evaluate.harness import XLSTM
    from xlstm_jax.evaluate.tasks import Tasks

    tasks, model = Tasks(tuple(TASKS), task_path), models.load(source)
    assert model.tokenizer is not None  # as `load` demands one
    lm, tokenizer = LM(model.cfg.model), tokenizers.get(model.tokenizer)
    metrics = tasks.run(XLSTM(lm, {"params": model.params}, tokenizer))
    columns = {task: 100 * metrics[task][metric] for task, metric in TASKS.items()}
    columns["mean"] = sum(columns.values()) / len(TASKS)
    columns["lambada_perplexity"] = metrics["lambada_openai"].get("perplexity", math.nan)
    return {"columns": columns, "metrics": metrics, "dtype": model.cfg.model.dtype}


def outcome(measured: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
    """Whether each expectation on small models holds."""
    holds = {}
    for label, one in measured.items():
        holds[f"{label}: above {MIN_CHOICE} of next lines"] = one["acc_norm"] > MIN_CHOICE
        holds[f"{label}: above {MIN_WORD} of last words"] = one["last_word_acc"] > MIN_WORD
    return holds


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Accuracies of the small models, with the level of chance."""
    plt = record.pyplot()
    names = {"acc": "next line", "acc_norm": "next line, per byte", "last_word_acc": "last word"}
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (label, one) in enumerate(result["models"].items()):
        x = np.arange(len(names)) + 0.35 * (number - 0.5)
        axes.bar(x, [one[name] for name in names], width=0.33, color=f"C{number}", label=label)
    axes.plot([-0.4, 1.4], [1 / NUM_CHOICES] * 2, ":", color="0.3", label="chance")
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_ylabel("accuracy")
    axes.set_title(f"Questions from validation text, size {result['size']}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Scores models on tasks and writes one JSON file, and a plot of small models."""

    size: record.Size = "cpu"
    models: tuple[str, ...] = ()  # of the size paper: runs, folders of transformers, hf://
    task_path: pathlib.Path | None = None  # folder with task files, NAME.yaml
    runs: pathlib.Path = pathlib.Path("runs/small_models")  # of the small models
    out: pathlib.Path = RESULTS / "downstream.json"  # the plot is written next to it


def paper(sources: Sequence[str], task_path: pathlib.Path | None) -> dict[str, Any]:
    """The published table and that of the given models."""
    if not sources:
        raise ConfigError(
            "--models must name at least one model with --size paper, got none; name runs or "
            "folders of transformers."
        )
    measured = {source: run_tasks(source, task_path) for source in sources}
    return {"models": measured, "published": ACCURACIES, "outcome": {}}


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    result = record.start("downstream", options.size)
    if options.size == "paper":
        return record.save(result | paper(options.models, options.task_path), options.out)
    measured = {}
    for family in FAMILIES:
        cfg = config(options.size, family)
        run = language_models.trained(cfg, options.runs)
        label = LABELS[family]
        measured[label] = score(str(run), cfg.data.source, NUM_QUESTIONS[options.size])
        print(label, measured[label], flush=True)
    result |= {"models": measured, "outcome": outcome(measured)}
    return record.save(result, options.out, plot)


if __name__ == "__main__":
    record.run(main, Options, __doc__)
