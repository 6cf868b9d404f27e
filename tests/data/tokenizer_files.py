"""Small tokenizer files, made once per process, as none can be downloaded."""

import functools
import io
import json
import pathlib
import tempfile
import textwrap

from xlstm_jax.data.train_tokenizer import train_bpe

TEXTS = [
    "plain text",
    "größer, 木, 🙂",
    "line\r\nend\0",
    "  two  spaces\n\n\tand a tab ",
    "\N{REPLACEMENT CHARACTER} e\u0301 \u2581 <0x41> ##s [x]",
    "def f(x):\n    return x * 3  # a comment\n",
    "a" * 300 + " " * 300 + "1234567890" * 20,
]


@functools.cache
def corpus() -> str:
    """English and code of the standard library."""
    return pathlib.Path(textwrap.__file__).read_text(encoding="utf-8")


@functools.cache
def byte_level_bpe() -> bytes:
    """A tokenizer.json by `train_bpe`."""
    with tempfile.TemporaryDirectory() as folder:
        train_bpe([corpus().encode()], 600, pathlib.Path(folder))
        return (pathlib.Path(folder) / "tokenizer.json").read_bytes()


@functools.cache
def metaspace_bpe() -> bytes:
    """A tokenizer.json in the layout of Llama 2: pieces of sentencepiece, and byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator([corpus()], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    values = json.loads(tokenizer.to_str())
    # The trainer makes special tokens of all; those of bytes are ordinary ones.
    values["added_tokens"] = values["added_tokens"][:3]
    return json.dumps(values).encode()


@functools.cache
def word_piece() -> bytes:
    """A tokenizer.json in the layout of BERT, with "[SEP]" at the end."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([corpus()], trainer)
    return tokenizer.to_str().encode()


@functools.cache
def sentencepiece_model(kind: str = "unigram", rule: str = "identity") -> bytes:
    """A model of sentencepiece; with rule="nmt_nfkc" it has a table of normalization."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus().splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=450,
        byte_fallback=True,
        character_coverage=0.999,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_folder(folder: pathlib.Path, data: bytes, **settings: object) -> str:
    """Writes a tokenizer and its settings; returns the path of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "tokenizer.json" if data.startswith(b"{") else "tokenizer.model"
    (folder / name).write_bytes(data)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)
