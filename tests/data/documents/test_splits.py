"""Splits by name, by content and by position: which text is in which split."""

import itertools
import logging

import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.data import SPLITS, DataConfig, load
from xlstm_jax.data.documents import read_path
from xlstm_jax.data.documents.splits import WORDS, divide, split_by_content, splits_of_name


def texts(source, pattern=None):
    """The names of files in each split; every file contains its own name."""
    documents = read_path(str(source), pattern).documents
    return {
        split: {line for d in docs for line in d.data.decode().splitlines()}
        for split, docs in documents.items()
    }


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    return folder


NAMED = {  # layouts whose names define the splits -> files of train, valid, test; others skipped
    "train/a.txt valid/a.txt test/a.txt": ("train/a.txt", "valid/a.txt", "test/a.txt"),
    "train/a.txt train/b.txt val/a.txt": ("train/a.txt train/b.txt", "val/a.txt", ""),
    "Training/a.txt VALIDATION/a.txt": ("Training/a.txt", "VALIDATION/a.txt", ""),
    "train/a.txt dev/a.txt eval/a.txt": ("train/a.txt", "dev/a.txt", "eval/a.txt"),
    "data/en/train/a.txt data/en/valid/a.txt": ("data/en/train/a.txt", "data/en/valid/a.txt", ""),
    "wiki.train.txt wiki.valid.txt wiki.test.txt": (
        "wiki.train.txt",
        "wiki.valid.txt",
        "wiki.test.txt",
    ),
    "train.txt dev.md README.md": ("train.txt", "dev.md", ""),
    "train-00000-of-00002.txt train-00001-of-00002.txt validation-00000-of-00001.txt": (
        "train-00000-of-00002.txt train-00001-of-00002.txt",
        "validation-00000-of-00001.txt",
        "",
    ),
    "train1.txt valid_1.txt Test2.txt": ("train1.txt", "valid_1.txt", "Test2.txt"),
    "train/dev-notes.txt train/test.txt valid/train.txt": (
        "train/dev-notes.txt train/test.txt",
        "valid/train.txt",
        "",
    ),
    "train/a.txt valid/a.txt a.txt sub/b.txt": ("train/a.txt", "valid/a.txt", ""),
    "valid/a.txt test/a.txt": ("", "valid/a.txt", "test/a.txt"),
    "evaluation.txt": ("", "", "evaluation.txt"),
}


@pytest.mark.parametrize("layout", NAMED)
def test_names_define_the_splits_and_are_never_mixed(tmp_path, layout):
    expected = {
        split: set(names.split()) for split, names in zip(SPLITS, NAMED[layout], strict=True)
    }
    assert texts(write(tmp_path, layout.split())) == expected


@pytest.mark.parametrize("word", WORDS)
def test_every_word_names_its_split_in_any_case_as_folder_or_part_of_a_file_name(word):
    names = (f"a/{word.upper()}/b.txt", f"{word.title()}.txt", f"x-{word}_00.txt.gz", f"x.{word}")
    assert [splits_of_name(name) for name in names] == [{WORDS[word]}] * 4
    others = (
        f"{word}s/b.txt",
        f"{word}set.txt",
        f"x{word}.txt",
        f"d\udce9{word}.txt",
        f"{word}.py",
    )
    assert [splits_of_name(name) for name in others] == [set()] * 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "train/valid/a.txt train/b.txt",
            "train/valid/a.txt must belong to one split.*train and v",
        ),
        (
            "train.txt wiki.test.valid.txt",
            "wiki.test.valid.txt must.* names test and valid; rename",
        ),
        ("val/test/a.txt", "val/test/a.txt must belong to one split, but its path names test and"),
    ],
)
def test_a_path_that_names_two_splits_is_rejected(tmp_path, names, message):
    with pytest.raises(ConfigError, match=message):
        read_path(str(write(tmp_path, names.split())), None)


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["src/a.py", "src/test/b.py", "train.py", *(f"m{i}.py" for i in range(60))], "*.py"),
        (["dev.txt", "train.test.txt", *(f"chapter {i}.txt" for i in range(60))], None),
    ],
    ids=["source code", "text"],
)
def test_a_word_among_files_without_train_does_not_define_a_split(tmp_path, caplog, names, pattern):
    split = texts(write(tmp_path, names), pattern)
    assert set.union(*split.values()) == set(names)
    assert all(
        names == {n for n in names if split_by_content(f"{n}\n".encode()) == s}
        for s, names in split.items()
    )
    assert "name a split but are split like all others, as no file names 'train'" in caplog.text


def test_skipped_files_and_an_absent_valid_are_logged_once(tmp_path, caplog):
    names = [*(f"train/{i}.txt" for i in range(100)), "a.txt", "LICENSE.md", "picture.png"]
    cfg = DataConfig(source=str(write(tmp_path, names)), seq_len=4)
    with caplog.at_level(logging.WARNING):
        for split in ("train", "valid", "train"):
            load(cfg, split)
    messages = [
        record.message.removeprefix(f"data.source='{tmp_path}'") for record in caplog.records
    ]
    valid = sum(split_by_content(f"{name}\n".encode()) == "valid" for name in names[:100])
    assert messages == [
        ": 1 files (1 .png) are not text and are skipped",
        ": 2 of 102 files name no split and are skipped: LICENSE.md, a.txt",
        f" names no split 'valid': it is {valid} of the 100 documents of 'train'",
    ]


def test_an_absent_valid_is_taken_out_of_train_by_content(tmp_path):
    names = [f"train/{number}.txt" for number in range(200)] + ["test/0.txt"]
    before = texts(write(tmp_path, names))
    assert not before["train"] & before["valid"]
    assert before["train"] | before["valid"] == set(names[:200])
    assert 3 <= len(before["valid"]) <= 20
    after = texts(write(tmp_path, [f"train/{number}.txt" for number in range(200, 300)]))
    assert before["valid"] <= after["valid"] and before["train"] <= after["train"]


@pytest.mark.parametrize("files", [1, 3])
def test_an_absent_valid_is_the_end_of_every_document_of_a_few(tmp_path, files):
    (tmp_path / "train").mkdir()
    for number in range(files):
        lines = [f"{number}: line {line}\n" for line in range(1000)]
        (tmp_path / "train" / f"{number}.txt").write_text("".join(lines))
    split = texts(tmp_path)
    assert len(split["train"]) == 951 * files and len(split["valid"]) == 49 * files
    assert "0: line 950" in split["train"] and "0: line 951" in split["valid"]


def test_an_absent_test_is_an_error_only_when_it_is_asked_for(tmp_path):
    cfg = DataConfig(source=str(write(tmp_path, ["train.txt", "valid.txt"])), seq_len=4)
    load(cfg, "train"), load(cfg, "valid")
    with pytest.raises(ConfigError, match=r"for split='test', got none \(1 in train, 1 in valid"):
        load(cfg, "test")


def test_an_empty_valid_is_not_replaced(tmp_path):
    (write(tmp_path, ["train.txt"]) / "valid.txt").touch()
    with pytest.raises(ConfigError, match="for split='valid', got none"):
        load(DataConfig(source=str(tmp_path)), "valid")


LONG = {  # one document each
    "one line": b"a text without a single line end " * 2500,
    "title and one line": b"title\n" + b"word " * 20000,
    "title page and one line": b"title\n" * 150 + b"word " * 20000,
    "99 lines": b"word\n" * 98 + b"word",
    "umlauts": ("ä" * 40_001 + "木" * 9999).encode(),
    "binary": b"\x80" * 5000,
    "forty bytes": b"0123456789" * 4,
}


@pytest.mark.parametrize("name", LONG)
def test_a_document_of_few_lines_is_divided_by_position_with_gaps(tmp_path, name):
    data = LONG[name]
    (tmp_path / "only.txt").write_bytes(data)
    for source in (tmp_path, tmp_path / "only.txt"):  # a folder with one document alike
        documents = read_path(str(source), None).documents
        parts = [documents[split][0].data for split in SPLITS]
        assert [documents[s][0].name for s in SPLITS] == [f"only.txt:{s}" for s in SPLITS]
        assert parts == divide(data, (90, 95))
    assert data.startswith(parts[0]) and data.endswith(parts[2])
    assert parts[1] in data[len(parts[0]) + 1 : -len(parts[2]) - 1]
    gaps = len(data) - sum(map(len, parts))
    assert gaps == pytest.approx(len(data) / 50, abs=8)
    shares = [len(part) / len(data) for part in parts]
    assert shares == pytest.approx([0.89, 0.04, 0.05], abs=0.03)
    if name != "binary":
        assert "\ufffd" not in "".join(part.decode(errors="replace") for part in parts)


@pytest.mark.parametrize("data", [b"a", b"ab\n", "木木".encode()])
def test_a_document_of_a_few_bytes_is_training_text(data):
    assert divide(data, (90, 95)) == [data, b"", b""]


def test_the_gap_of_a_long_document_is_bounded():
    data = bytes(range(1, 10)) * 5_000_000  # the size of a large text of one line
    parts = divide(data, (90, 95))
    assert len(data) - sum(map(len, parts)) == 2 << 16


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=repr)
def test_a_single_document_of_100_lines_is_divided_at_line_ends(tmp_path, end):
    lines = [b"line %d" % number + end for number in range(100)]
    (tmp_path / "one.txt").write_bytes(b"".join(lines))
    documents = read_path(str(tmp_path / "one.txt"), None).documents
    parts = [documents[split][0].data for split in SPLITS]
    assert b"".join(parts) == b"".join(lines)
    assert all(part.endswith(end) and part.startswith(b"line") for part in parts)
    assert len(parts[1]) == pytest.approx(0.05 * len(parts[0]) / 0.9, abs=20)


def test_mixed_line_ends_count_together():
    lines = [b"line" + end for end in itertools.islice(itertools.cycle((b"\n", b"\r")), 120)]
    parts = divide(b"".join(lines), (90, 95))
    assert b"".join(parts) == b"".join(lines)
    assert all(part.startswith(b"line") for part in parts)


def test_a_file_given_as_the_source_is_divided_whatever_it_is_called(tmp_path):
    (tmp_path / "wiki.test.txt").write_text("a line\n" * 200)
    counts = {
        s: len(t[0].data) for s, t in read_path(str(tmp_path / "wiki.test.txt"), None)[1].items()
    }
    assert counts == {"train": 1267, "valid": 70, "test": 63}
