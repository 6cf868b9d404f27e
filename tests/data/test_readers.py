"""Reading of files as documents, and their splits."""

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import SPLITS, DataConfig, load
from xlstm_jax.data.readers import Document, read_folder, read_path, split_by_hash, split_of


@pytest.fixture
def folder(tmp_path):
    """Two hundred small files in subfolders, and files that must not be read."""
    for number in range(200):
        path = tmp_path / f"part{number % 3}" / f"{number:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text number {number}\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    return tmp_path


def document_names(corpus):
    return {split: [d.name for d in docs] for split, docs in corpus.documents.items()}


def test_matching_files_are_read_in_the_order_of_their_paths(folder):
    names = [document.name for document in read_folder(folder, ["*.txt"])]
    expected = sorted(f"part{number % 3}/{number:03d}.txt" for number in range(200))
    assert names == expected


def test_skipped_folders_are_not_entered(folder):
    names = [d.name for d in read_folder(folder, ["*.txt"], skip=frozenset({"part1"}))]
    assert names and not any(name.startswith("part1/") for name in names)


def test_splits_are_disjoint_and_complete_and_about_90_5_5(folder):
    by_split = document_names(read_path(str(folder), "*.txt"))
    together = [name for split in SPLITS for name in by_split[split]]
    assert len(together) == len(set(together)) == 200
    assert 165 <= len(by_split["train"]) <= 192
    assert by_split["valid"] and by_split["test"]


def test_documents_keep_their_split_when_others_are_added_or_they_are_renamed(folder):
    before = document_names(read_path(str(folder), "*.txt"))
    for number in range(200, 260):
        (folder / f"{number}.txt").write_text(f"text number {number}\n")
    (folder / "part0" / "000.txt").rename(folder / "renamed.txt")
    after = document_names(read_path(str(folder), "*.txt"))
    for split in SPLITS:
        renamed = {"renamed.txt" if name == "part0/000.txt" else name for name in before[split]}
        assert renamed <= set(after[split])


def test_copies_of_a_text_share_a_split():
    corpus = split_by_hash("copies", [Document(str(i), b"the same") for i in range(20)])
    assert sorted(len(documents) for documents in corpus.documents.values()) == [0, 0, 20]
    assert len(corpus.documents[split_of(b"the same")]) == 20


def test_the_hash_of_a_corpus_depends_on_names_and_contents():
    def describe(name, data):
        return split_by_hash("x", [Document(name, data)]).describe()["sha256"]

    assert describe("a", b"1") == describe("a", b"1")
    assert len({describe("a", b"1"), describe("b", b"1"), describe("a", b"2")}) == 3


def test_subfolders_named_after_the_splits_define_them(tmp_path):
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "only.txt").write_text(f"for {split}")
    corpus = read_path(str(tmp_path), "*.txt")
    assert {s: docs[0].data.decode() for s, docs in corpus.documents.items()} == {
        split: f"for {split}" for split in SPLITS
    }


def test_a_single_file_is_split_in_order_at_line_ends(tmp_path):
    data = b"".join(b"line %d\n" % number for number in range(1000))
    (tmp_path / "book.txt").write_bytes(data)
    documents = read_path(str(tmp_path / "book.txt"), "*.txt").documents
    parts = [documents[split][0].data for split in SPLITS]
    assert b"".join(parts) == data
    assert all(part.endswith(b"\n") for part in parts)
    assert len(parts[0]) == pytest.approx(0.9 * len(data), abs=10)
    assert len(parts[1]) == pytest.approx(0.05 * len(data), abs=20)


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_path_is_rejected_with_the_expected_layout(tmp_path, split):
    cfg = DataConfig(source=str(tmp_path / "nowhere"), pattern="*.md")
    expected = r"data\.source='.*nowhere' is neither .*stdlib.*a text file, or a folder with files "
    with pytest.raises(ConfigError, match=expected + r".*'\*\.md'.*train/, valid/ and test/\."):
        load(cfg, split)


def test_a_folder_without_matching_files_is_rejected_with_the_expected_layout(folder):
    with pytest.raises(
        ConfigError, match=r"contains no text; it must be a text file, or .*'\*\.rst'"
    ):
        load(DataConfig(source=str(folder), pattern="*.rst"), "train")


def test_an_empty_file_is_rejected(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="contains no text"):
        load(DataConfig(source=str(tmp_path / "empty.txt")), "train")


def test_an_empty_split_is_rejected(tmp_path):
    (tmp_path / "one.txt").write_text("one text")
    others = [split for split in SPLITS if split != split_of(b"one text")]
    with pytest.raises(ConfigError, match=f"at least one document for split={others[0]!r}.*add"):
        load(DataConfig(source=str(tmp_path)), others[0])
