"""Does xLSTM have a lower loss than other models on most domains of text?

Published, for 1.3B parameters trained on 300B tokens, over the 571 domains of 16 sources of PALOMA:
xLSTM[1:0] has a lower perplexity than Mamba in 568 domains, than Llama in 486, than RWKV-4 in 570;
the mean perplexity of the 12 main sources is 11.58 (Mamba 11.84, Llama 12.04, RWKV-4 13.18). The
perplexity of a source is exp(mean loss of the tokens of its domains). Documents are divided into
windows of 2048 tokens, and every token counts once.

Expected at the size cpu, with two small models trained on source code and domains of the built-in
texts: both have fewer bits per byte on validation source code than on any other source.

    python experiments/paloma.py --size cpu
    python experiments/paloma.py --prepare RAW --domains DOMAINS       # a file per domain, as below
    python experiments/paloma.py --size paper --models XLSTM LLAMA MAMBA --domains DOMAINS
    xlstm-jax evaluate XLSTM LLAMA --domains DOMAINS                   # the same figures, by domain

RAW has files .jsonl or .jsonl.gz, at any depth, of objects with text, source and subdomain; DOMAINS
gets one file SOURCE__SUBDOMAIN.jsonl for each domain. MODELS are runs, folders of transformers, or
hf://ORG/NAME; the wins of the first over each other one are counted. `--size paper:FAMILY_SIZE` of
`xlstm-jax train` trains a published model.

Source: Beck et al. 2024, arXiv:2405.04517, tables 4, 9 and 10; Magnusson et al. 2023,
arXiv:2312.10523. Sizes: smoke (seconds), cpu (minutes), paper (models of the user).
"""

import dataclasses
import gzip
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from experiments import ladder, language_models, record
from experiments.language_models import LABELS
from xlstm_jax import cpu
from xlstm_jax.config import ConfigError
from xlstm_jax.data import corpora, tokenizers
from xlstm_jax.errors import quote_path
from xlstm_jax.evaluate import Domain, by_domain, wins
from xlstm_jax.evaluate.domains import mean_loss
from xlstm_jax.modules import LM
from xlstm_jax.train import ExperimentConfig, models

COLUMNS = {
    "c4_en": "C4",
    "mc4": "MC4-EN",
    "wikitext_103": "Wikitext-103",
    "ptb": "PTB",
    "redpajama": "RedPajama",
    "falcon-refinedweb": "RefinedWeb",
    "dolma-v1_5": "Dolma",
    "m2d2_s2orc_unsplit": "S2ORC",
    "m2d2_wikipedia_unsplit": "Wikipedia",
    "c4_100_domains": "C4-100",
    "dolma_100_subreddits": "100 subreddits",
    "dolma_100_programing_languages": "100 programming languages",
}
"""Source of PALOMA, as it spells it -> column of the published tables."""

MEANS = {
    "rwkv4": (23.74, 17.55, 14.08, 13.18),
    "llama": (20.92, 15.67, 13.49, 12.04),
    "mamba": (20.05, 15.19, 13.30, 11.84),
    "xlstm_1:0": (19.68, 14.88, 12.76, 11.58),
    "xlstm_7:1": (19.44, 14.88, 12.80, 11.69),
}
"""Family -> published mean perplexity of the columns, from 125m to 1.3b."""

WINS = {"mamba": 568, "llama": 486, "rwkv4": 570}
"""Family -> domains of 571 in which xLSTM[1:0] is better, at 1.3b."""

SEPARATOR = "__"
FAMILIES = ("xlstm_1:0", "llama")  # of the small models
DOMAIN_BYTES, MIN_DOMAIN_BYTES = 6000, 1500  # of the domains of the built-in texts
RESULTS = pathlib.Path(__file__).parent / "results"


def config(size: str = "cpu", model: str = "") -> ExperimentConfig:
    """The run of a model that is evaluated; `size` may be SIZE:MODEL.

    Args:
        model: a family of the small models, by default xlstm_1:0; of the size paper FAMILY_SIZE,
            by default xlstm_1:0_1.3b.

    Raises:
        ConfigError: the size or the model is unknown.
    """
    published = [name.removesuffix("_300b") for name in ladder.runs_of("300b")]
    is_paper = size.partition(":")[0] == "paper"
    names, default = (published, "xlstm_1:0_1.3b") if is_paper else (FAMILIES, FAMILIES[0])
    size, model = language_models.parse_size(
        size, ("smoke", "cpu", "paper"), names, model or default
    )
    if is_paper:
        return ladder.config("paper", f"{model}_300b")
    return language_models.small_run(size, model)


def read_documents(raw: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The documents of all files of a folder; raises ConfigError if it has no files."""
    files = sorted([*raw.rglob("*.jsonl"), *raw.rglob("*.jsonl.gz")])
    if not files:
        raise ConfigError(
            f"--prepare must be a folder with files .jsonl or .jsonl.gz of objects with the fields "
            f"text, source and subdomain, got {quote_path(raw)}, which has none; check the path."
        )
    for path in files:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for number, line in enumerate(file, start=1):
                document = json.loads(line)
                if not isinstance(document, dict) or not {"text", "source"} <= document.keys():
                    raise ConfigError(
                        f"{quote_path(path)}:{number} must be an object with the fields text and "
                        "source; correct it."
                    )
                yield document


def prepare_domains(raw: pathlib.Path, out: pathlib.Path) -> int:
    """Writes one file of documents per domain; returns the number of domains."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(
            f"--domains must be a new or an empty folder with --prepare, got {quote_path(out)}; "
            "choose another."
        )
    names = set()
    for document in read_documents(raw):
        domain = document.get("subdomain") or "all"
        name = f"{document['source']}{SEPARATOR}{domain}".replace("/", "_")
        names.add(name)
        with (out / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"text": document["text"]}) + "\n")
    return len(names)


def builtin_domains(out: pathlib.Path, max_domains: int = 40) -> pathlib.Path:
    """Writes domains of built-in evaluation texts: code by package, other texts by corpus."""
    texts: dict[str, list[str]] = defaultdict(list)
    for corpus in ("stdlib", "topics", "unicode", "texts", "grammar"):
        splits = corpora.read_corpus(corpus).documents
        for document in (*splits["valid"], *splits["test"]):
            package = pathlib.PurePath(document.name).parts[0].removesuffix(".py")
            part = package if corpus == "stdlib" else "all"
            name = f"{corpus}{SEPARATOR}{part}"
            if sum(map(len, texts[name])) < DOMAIN_BYTES:
                texts[name].append(document.data[:DOMAIN_BYTES].decode(errors="replace"))
    large = [name for name, parts in texts.items() if sum(map(len, parts)) >= MIN_DOMAIN_BYTES]
    out.mkdir(parents=True, exist_ok=True)
    for name in large[:max_domains] + [n for n in large[max_domains:] if "stdlib" not in n]:
        lines = [json.dumps({"text": text}) + "\n" for text in texts[name]]
        (out / f"{name}.jsonl").write_text("".join(lines))
    return out


def evaluate(source: str, folder: pathlib.Path, seq_len: int) -> dict[str, Domain]:
    """The loss of every domain."""
    model = models.load(source)
    assert model.tokenizer is not None  # as `load` demands one
    tokenizer = tokenizers.get(model.tokenizer)
    variables = {"params": model.params}
    return by_domain(LM(model.cfg.model), variables, tokenizer, folder, seq_len=seq_len)


def by_source(domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """The domains of each source as one."""
    groups: dict[str, dict[str, Domain]] = defaultdict(dict)
    for name, domain in domains.items():
        groups[name.partition(SEPARATOR)[0]][name] = domain
    return {source: mean_loss(group) for source, group in groups.items()}


def mean_of_columns(sources: Mapping[str, Domain]) -> float | None:
    """The mean perplexity of the 12 published columns; None if one of them is missing."""
    if not set(COLUMNS) <= set(sources):
        return None
    return sum(math.exp(sources[name].nats_per_token) for name in COLUMNS) / len(COLUMNS)


def measure(names: Mapping[str, str], folder: pathlib.Path, seq_len: int) -> dict[str, Any]:
    """Losses of models by source, and in how many domains the first one beats each other one.

    Args:
        names: label -> run or folder of a model.
    """
    domains = {label: evaluate(path, folder, seq_len) for label, path in names.items()}
    sources = {label: by_source(each) for label, each in domains.items()}
    first, *others = domains
    return {
        "num_domains": len(domains[first]),
        "models": {
            label: {
                "mean_perplexity": mean_of_columns(each),
                "perplexity": {k: math.exp(d.nats_per_token) for k, d in each.items()},
                "bits_per_byte": {k: round(d.bits_per_byte, 4) for k, d in each.items()},
                "domains": {k: round(d.bits_per_byte, 4) for k, d in domains[label].items()},
            }
            for label, each in sources.items()
        },
        "wins": {other: wins(domains[first], domains[other])._asdict() for other in others},
    }


def outcome(result: Mapping[str, Any], trained_on: str | None) -> dict[str, bool]:
    """Whether each expectation holds.

    Args:
        trained_on: the source of the training text of small models; None: published ones, of which
            the first must win more than half of the domains.
    """
    if trained_on is None:
        half = result["num_domains"] / 2
        return {f"more wins than {k}": w["num_wins"] > half for k, w in result["wins"].items()}
    expectations = {}
    for label, model in result["models"].items():
        own, *others = sorted(model["bits_per_byte"], key=lambda name: name != trained_on)
        bits = model["bits_per_byte"]
        is_lowest = all(bits[own] < bits[other] for other in others)
        expectations[f"{label}: {trained_on} has the fewest bits per byte"] = is_lowest
    return expectations


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bits per byte of every domain, one model over the other."""
    plt = record.pyplot()
    first, second = list(result["models"])[:2]
    x, y = (result["models"][label]["domains"] for label in (second, first))
    figure, axes = plt.subplots(figsize=(5.2, 5), layout="constrained")
    for number, source in enumerate(dict.fromkeys(name.partition(SEPARATOR)[0] for name in x)):
        names = [name for name in x if name.partition(SEPARATOR)[0] == source]
        style = dict(color=f"C{number % 10}", ms=5, label=COLUMNS.get(source, source))
        axes.plot([x[n] for n in names], [y[n] for n in names], "o", **style)
    values = [*x.values(), *y.values()]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, ":", color="0.5")
    axes.set_xlabel(f"{second}, bits per byte")
    axes.set_ylabel(f"{first}, bits per byte")
    count = result["wins"][second]
    axes.set_title(f"{first} is lower in {count['num_wins']} of {count['num_domains']} domains")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluates models on domains and writes one JSON file and one plot."""

    size: record.Size = "cpu"
    models: tuple[str, ...] = ()  # of the size paper: runs, folders of transformers, hf://
    domains: pathlib.Path = pathlib.Path("paloma")  # folder of the domains of the size paper
    prepare: pathlib.Path | None = None  # RAW; writes --domains and ends
    runs: pathlib.Path = pathlib.Path("runs/small_models")  # of the small models
    out: pathlib.Path = RESULTS / "paloma.json"  # the plot is written next to it


def main(options: Options) -> int:
    """Runs the experiment; returns 0 if all expectations hold (smoke: always), else 1."""
    cpu.prepare()
    if options.prepare is not None:
        print(f"{prepare_domains(options.prepare, options.domains)} domains")
        return 0
    result = record.start("paloma", options.size)
    if options.size == "paper":
        if len(options.models) < 2:
            raise ConfigError(
                f"--models must name at least two models with --size paper, got "
                f"{len(options.models)}; the first is compared with the others."
            )
        measured = measure({name: name for name in options.models}, options.domains, 2048)
        published = {"published": {"mean_perplexity": MEANS, "wins": WINS}}
        result |= measured | published | {"outcome": outcome(measured, None)}
        return record.save(result, options.out, plot)
    configs = {LABELS[family]: config(options.size, family) for family in FAMILIES}
    runs = {k: str(language_models.trained(cfg, options.runs)) for k, cfg in configs.items()}
    is_smoke = options.size == "smoke"
    folder = builtin_domains(options.runs / f"{options.size}_domains", 2 if is_smoke else 40)
    measured = measure(runs, folder, 16 if is_smoke else language_models.SMALL_DATA.seq_len)
    source = next(iter(configs.values())).data.source
    return record.save(
        result | measured | {"outcome": outcome(measured, source)}, options.out, plot
    )


if __name__ == "__main__":
    record.run(main, Options, __doc__)
