"""The model card of uploaded weights: README.md, with the YAML header that the hub reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from xlstm_jax import __version__
from xlstm_jax.convert import families, license, mapping
from xlstm_jax.data.tokenizers import locate
from xlstm_jax.modules.config import LMConfig

_TRANSFORMERS = """\
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained("{name}")
"""
_OURS = """\
from xlstm_jax import convert
from xlstm_jax.modules import LM

cfg, params = convert.load_hf("hf://{name}")
logits, state = LM(cfg).apply({{"params": params}}, tokens)  # tokens: batch, time
"""


def model_card(
    name: str,
    cfg: LMConfig,
    folder: Path,
    *,
    license_line: str,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """The text of a model card.

    Args:
        name: ORG/NAME of the repository.
        cfg: config of a model that one of the families can represent.
        folder: has the tokenizer, if any.
        license_line: of the weights, as `license.find` gives it.
        metrics: of the run, on validation data, such as `valid_loss`.
    """
    has_tokenizer = locate.has_tokenizer(folder)
    return "\n".join(
        [
            *_header(license_line),
            f"# {name.split('/')[-1]}",
            "",
            f"Weights of a language model, written by xlstm-jax {__version__}.",
            "",
            *_table(_facts(cfg, license_line, has_tokenizer=has_tokenizer)),
            "",
            "## Use",
            "",
            *_code("python", _loading(name, has_tokenizer=has_tokenizer)),
            "",
            *_code("python", _OURS.format(name=name)),
            "",
            *_code("sh", f'xlstm-jax generate hf://{name} --prompt "..."\n'),
            *(["", "## Validation data", "", *_table(_rounded(metrics))] if metrics else []),
            "",
        ]
    )


def _header(license_line: str) -> list[str]:
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= license.header_fields(license_line)
    # JSON strings are YAML strings.
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return ["---", *lines, "tags:", "- xlstm-jax", "---", ""]


def _facts(cfg: LMConfig, license_line: str, *, has_tokenizer: bool) -> dict[str, str]:
    family, _ = families.of_model(cfg)
    assert family is not None  # as it was written or read
    count = sum(math.prod(leaf.shape) for leaf in mapping.parameters(cfg).values())
    return {
        "architecture": f"`{family.architecture}` (`{family.model_type}`)",
        "parameters": f"{count:,}",
        "blocks": f"{cfg.num_blocks}, of width {cfg.dim:,}",
        "vocabulary": f"{cfg.vocab_size:,} tokens",
        "tokenizer": "in this repository" if has_tokenizer else "none in this repository",
        "license of the weights": license_line,
    }


def _loading(name: str, *, has_tokenizer: bool) -> str:
    classes = "AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else "")
    text = _TRANSFORMERS.format(classes=classes, name=name)
    return text + (
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n' if has_tokenizer else ""
    )


def _rounded(metrics: Mapping[str, float]) -> dict[str, str]:
    return {f"`{name}`": f"{value:,.6g}" for name, value in metrics.items()}


def _table(fields: Mapping[str, str]) -> list[str]:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in fields.items()]
    return ["| | |", "|---|---|", *lines]


def _code(language: str, text: str) -> list[str]:
    return [f"```{language}", *text.splitlines(), "```"]
