"""Model families of `transformers` that can be read and written, one module each."""

from typing import Any

from xlstm_jax.convert.families import llama, mamba, mamba2, qwen3_next, rwkv, xlstm
from xlstm_jax.convert.families.record import Family
from xlstm_jax.errors import ConfigError, quote
from xlstm_jax.modules.config import LMConfig

FAMILIES = {
    module.FAMILY.model_type: module.FAMILY
    for module in (xlstm, llama, mamba, mamba2, rwkv, qwen3_next)
}
"""`model_type` of config.json -> family."""


def of_type(model_type: Any, where: str) -> Family:
    """The family of a config; raises ConfigError, which calls the config `where`, if unknown."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(repr(name) for name in FAMILIES)
        raise ConfigError(
            f"model_type of {where} must be one of {known}, got {quote(model_type)}; other "
            "architectures have no blocks here."
        )
    return FAMILIES[model_type]


def of_model(cfg: LMConfig) -> tuple[Family | None, str | None]:
    """The family that can represent a model, or the nearest one and why it cannot."""
    letters = set(cfg.pattern)
    nearest = [family for family in FAMILIES.values() if letters <= set(family.letters)]
    if not nearest:
        known = [family.letters for family in FAMILIES.values()]
        others = f"{', '.join(known[:-1])} or {known[-1]}"
        return None, f"pattern={quote(cfg.pattern)} with letters other than {others}"
    unmet = {
        family.model_type: [demand for demand, fits in family.demands(cfg).items() if not fits]
        for family in nearest
    }
    family = min(nearest, key=lambda family: len(unmet[family.model_type]))
    return family, ", ".join(unmet[family.model_type]) or None
