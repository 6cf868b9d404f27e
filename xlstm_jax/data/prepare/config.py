"""Configuration of `prepare`, and the share of one process."""

import dataclasses
import re

from xlstm_jax.config.fields import check_fields
from xlstm_jax.data.config import Split
from xlstm_jax.errors import ConfigError, quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Raw files and how they become tokens; the prepared data depend on nothing else."""

    source: str  # a file or a folder with raw text
    tokenizer: str = "byte"  # as `data.tokenizer`
    pattern: str | None = None  # as `data.pattern`
    text_field: str = "text"  # field or column with the text
    split: Split | None = None  # of all documents; None: by name, or by content
    chat: bool = False  # records are conversations, formatted by the tokenizer's chat template
    messages_field: str = "messages"  # field or column with the conversation
    imports: tuple[str, ...] = ()  # modules that register tokenizers

    def __post_init__(self):
        check_fields(self, "", {})


@dataclasses.dataclass(frozen=True)
class Share:
    """The input shards k of one process: those with k % count == index."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """The share "I/N"; raises ConfigError unless 0 <= I < N."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise ConfigError(
                f"--shard must be I/N with I from 0 to N - 1, got {quote(text)}; write 0/4, 1/4, "
                "2/4 and 3/4 for four machines."
            )
        return cls(int(match[1]), int(match[2]))
