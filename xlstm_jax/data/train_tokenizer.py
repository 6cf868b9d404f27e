"""Training of a byte-level BPE tokenizer (Sennrich et al. 2016, arXiv:1508.07909; the bytes as in
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from xlstm_jax.data.tokenizers import files
from xlstm_jax.data.tokenizers.from_file import library_errors
from xlstm_jax.errors import ConfigError, import_optional

EOS_TOKEN = "<|endoftext|>"
MIN_VOCAB = 258  # all bytes, the token that ends a document, and one merge


def train_bpe(documents: Iterable[bytes], vocab_size: int, out: Path) -> None:
    """Writes `out/tokenizer.json` and `tokenizer_config.json` of a byte-level BPE.

    The same documents yield the same files. They are read once, as a stream; only the
    counts of different words are in memory.

    Args:
        documents: texts in UTF-8.
        vocab_size: ids at most, with the token `<|endoftext|>`; few documents yield fewer.

    Raises:
        ConfigError: the size is out of range, or the documents have no text or are not UTF-8.
    """
    if not MIN_VOCAB <= vocab_size < 1 << 31:
        raise ConfigError(
            f"vocab_size must be in {MIN_VOCAB}..{(1 << 31) - 1}, got {vocab_size}; 256 ids are "
            "bytes, and one ends a document."
        )
    import_optional("tokenizers", "training a tokenizer", install="xlstm-jax[data]")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # a set, in random order
        show_progress=False,
    )
    with library_errors(out, "cannot be trained"):
        tokenizer.train_from_iterator(_texts(documents), trainer)
    # Indented, as the library saves it to a file.
    files.write(out / files.JSON, tokenizer.to_str(pretty=True).encode())
    settings = {"eos_token": EOS_TOKEN, "bos_token": EOS_TOKEN, "unk_token": EOS_TOKEN}
    files.write(out / files.CONFIG, (json.dumps(settings, indent=1) + "\n").encode())


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    """The documents as text; raises ConfigError if one is not UTF-8, or all are empty."""
    is_empty = True
    for number, data in enumerate(documents, 1):
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"document {number} must be UTF-8, but byte {error.start:,} is not; correct or "
                "exclude it."
            ) from error
        is_empty &= not text
        yield text
    if is_empty:
        raise ConfigError("documents must have text to train a tokenizer on, got none; add some.")
