"""Reading of folders and files as documents, and the identity of data."""

import os
import shutil

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import SPLITS, DataConfig, load, load_all
from xlstm_jax.data.batch import differences_of_data
from xlstm_jax.data.documents import Document, read_all, read_path, split_by_hash
from xlstm_jax.data.documents.splits import split_by_content


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
    names = [document.name for document in read_all(str(folder), "*.txt").documents["all"]]
    expected = sorted(f"part{number % 3}/{number:03d}.txt" for number in range(200))
    assert names == expected


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
    assert len(corpus.documents[split_by_content(b"the same")]) == 20


def test_the_hash_of_a_corpus_depends_on_names_and_contents():
    def describe(name, data):
        return split_by_hash("x", [Document(name, data)]).describe()["sha256"]

    assert describe("a", b"1") == describe("a", b"1")
    assert len({describe("a", b"1"), describe("b", b"1"), describe("a", b"2")}) == 3


def test_a_single_file_is_split_in_order_at_line_ends(tmp_path):
    data = b"".join(b"line %d\n" % number for number in range(1000))
    (tmp_path / "book.txt").write_bytes(data)
    documents = read_path(str(tmp_path / "book.txt"), None).documents
    parts = [documents[split][0].data for split in SPLITS]
    assert b"".join(parts) == data
    assert all(part.endswith(b"\n") for part in parts)
    assert len(parts[0]) == pytest.approx(0.9 * len(data), abs=10)
    assert len(parts[1]) == pytest.approx(0.05 * len(data), abs=20)


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_path_is_rejected_with_the_names_and_the_way_to_give_a_new_path(tmp_path, split):
    cfg = DataConfig(source=str(tmp_path / "nowhere"))
    with pytest.raises(
        ConfigError,
        match=r"data\.source='.*nowhere' is neither .*stdlib.*give their new path \(--data\.source",
    ):
        load(cfg, split)


@pytest.mark.parametrize(
    "source", ["~nobody-has-this-name/x", "x" * 300, "a\0b"], ids=["home", "long", "null"]
)
def test_a_path_that_cannot_exist_is_rejected(source):
    with pytest.raises(ConfigError, match="is neither the name of a data set nor"):
        load(DataConfig(source=source), "train")


def test_an_empty_source_is_rejected_when_the_config_is_built():
    with pytest.raises(ConfigError, match=r"data\.source must be .*got ''; use '\.'"):
        DataConfig(source="")


@pytest.mark.parametrize("read", [load, lambda cfg, split: load_all(cfg)], ids=["load", "load_all"])
def test_a_name_that_is_also_a_path_is_rejected_with_the_way_to_write_the_path(
    tmp_path, monkeypatch, read
):
    monkeypatch.chdir(tmp_path)
    load(DataConfig(source="grammar"), "train")
    (tmp_path / "grammar").mkdir()
    (tmp_path / "grammar" / "my.txt").write_text("my own text\n" * 200)
    with pytest.raises(ConfigError, match=r"'grammar' must be unambiguous.*write '\./grammar'"):
        read(DataConfig(source="grammar"), "train")
    assert b"my own" in bytes(
        t for t in load(DataConfig(source="./grammar"), "train").store.tokens[:20]
    )


def test_a_folder_without_matching_files_is_rejected_with_what_it_has(folder):
    with pytest.raises(
        ConfigError,
        match=r"match data\.pattern='\*\.rst' .*but it has 202 files \(201 \.txt, 1 \.png\)",
    ):
        load(DataConfig(source=str(folder), pattern="*.rst"), "train")


@pytest.mark.parametrize("name", ["", "empty.txt"])
def test_files_without_text_are_rejected(tmp_path, name):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"contains no text: 1 files \(1 \.txt\) are empty"):
        load(DataConfig(source=str(tmp_path / name)), "train")


def test_an_empty_split_is_rejected_with_the_counts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("one text")
    others = [split for split in SPLITS if split != split_by_content(b"one text")]
    with pytest.raises(
        ConfigError, match=f"for split={others[0]!r}, got none .*0 in {others[0]}.*; add"
    ):
        load(DataConfig(source=str(tmp_path)), others[0])


def test_names_that_are_not_utf8_are_read(tmp_path):
    for number in range(3):
        path = os.path.join(os.fsencode(tmp_path), b"caf%d\xe9.txt" % number)
        with open(path, "wb") as file:
            file.write(b"text")
    description = load(DataConfig(source=str(tmp_path)), split_by_content(b"text")).description
    assert sum(description["num_documents"].values()) == 3


def test_links_to_folders_are_followed_except_to_those_that_contain_them(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for path in (corpus, other):
        path.mkdir()
        (path / f"{path.name}.txt").write_text(path.name)
    (corpus / "link").symlink_to(other)
    (corpus / "itself").symlink_to(corpus)
    (other / "back").symlink_to(corpus)
    names = [document.name for document in read_all(str(corpus), None).documents["all"]]
    assert names == ["corpus.txt", "link/other.txt"]


def test_a_broken_link_is_an_error_and_a_pipe_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    assert len(read_all(str(tmp_path), None).documents["all"]) == 1
    with pytest.raises(ConfigError, match="must be a regular file or a folder"):
        read_all(str(tmp_path / "pipe.txt"), None)
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError):
        read_all(str(tmp_path), None)


# SHA-256 over the names and contents of text that earlier versions split in the same way.
STORED = {
    "folder": "e5f2b84c9fc9e0939f5002252073fb27400843e6c6236cfccd4cc25fdb3429d3",
    "book.txt": "8896fe75f14be3d48790c8875af9af3ae7d9dc23f9ac2d396bd09f2e322aa1a0",
    "stray.txt": "6713aa59a3dc2b3a1e19661d29e59d1817fdf3e6b9b95d4fa844e18b35f191a5",
    "named": "f118646d25b0350ff32830e5867a371ab82d669b4ac73d812f0381a036e93ae0",
}


@pytest.mark.parametrize("pattern", [None, "*.txt"])
@pytest.mark.parametrize("name", STORED)
def test_data_of_earlier_runs_have_the_same_splits_and_are_recognized(
    folder, tmp_path, name, pattern
):
    root = tmp_path / "earlier"
    shutil.copytree(folder, root / "folder", ignore=shutil.ignore_patterns("earlier"))
    (root / "book.txt").write_bytes(b"".join(b"line %d\r\n" % n for n in range(1000)))
    (root / "stray.txt").write_bytes(b"".join(b"line %d\rback\n" % n for n in range(1000)))
    for split in SPLITS:
        (root / "named" / split / "sub").mkdir(parents=True)
        (root / "named" / split / "only.txt").write_text("for " + split)
        (root / "named" / split / "sub" / "b.txt").write_text("below " + split)
    description = load(DataConfig(source=str(root / name), pattern=pattern), "train").description
    stored = description | {"source": "elsewhere", "python": "3.9.0", "sha256": STORED[name]}
    del stored["content_sha256"]
    assert differences_of_data(description, stored) == []
    assert differences_of_data(description, stored | {"sha256": "other"})


def test_data_are_identified_by_content_wherever_they_are(folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(folder.parent)
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, copy)
    name = folder.name
    sources = [name, f"./{name}", f"{name}/", str(folder), f"{name}/../{name}", str(copy)]
    descriptions = [load(DataConfig(source=s), "train").description for s in sources]
    assert all(description == descriptions[0] for description in descriptions)
    assert not {"source", "python"} & set(descriptions[0])
    (copy / "part0" / "000.txt").write_text("changed")
    changed = load(DataConfig(source=str(copy)), "train").description
    assert differences_of_data(descriptions[0], changed)


def test_a_renamed_copy_of_a_file_is_the_same_data(tmp_path):
    for name in ("book.txt", "copy.md"):
        (tmp_path / name).write_bytes(b"a line\n" * 1000)
    descriptions = [
        load(DataConfig(source=str(tmp_path / name)), "train").description
        for name in ("book.txt", "copy.md")
    ]
    assert differences_of_data(*descriptions) == []


def test_load_all_has_the_documents_of_every_split(folder):
    cfg = DataConfig(source=str(folder))
    total = sum(load(cfg, split).store.num_tokens for split in SPLITS)
    assert load_all(cfg).store.num_tokens == total
    grammar = DataConfig(source="grammar")
    total = sum(load(grammar, split).store.num_tokens for split in SPLITS)
    assert load_all(grammar).store.num_tokens == total
    parity = DataConfig(source="parity", seq_len=16)
    assert load_all(parity).description["split"] == "valid"


def test_load_all_does_not_divide_a_file(tmp_path):
    data = b"no line end " * 100
    (tmp_path / "book.txt").write_bytes(data)
    windows = load_all(DataConfig(source=str(tmp_path / "book.txt")))
    assert bytes(windows.store.tokens[:-1].astype("uint8")) == data
