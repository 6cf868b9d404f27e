"""Raw text: files of many formats as streams of documents, and their assignment to splits."""

from xlstm_jax.data.documents.corpus import Corpus, read_all, read_path, split_by_hash
from xlstm_jax.data.documents.document import MAX_PIECE, SPLITS, Document, File, Split
from xlstm_jax.data.documents.reader import read
from xlstm_jax.data.documents.select import find, find_files

__all__ = [
    "MAX_PIECE",
    "SPLITS",
    "Corpus",
    "Document",
    "File",
    "Split",
    "find",
    "find_files",
    "read",
    "read_all",
    "read_path",
    "split_by_hash",
]
