"""Tokenizers: text to token ids and back."""

from xlstm_jax.data.tokenizers.protocol import BaseTokenizer, ByteTokenizer, Tokenizer
from xlstm_jax.data.tokenizers.table import TOKENIZERS, get

__all__ = ["TOKENIZERS", "BaseTokenizer", "ByteTokenizer", "Tokenizer", "get"]
