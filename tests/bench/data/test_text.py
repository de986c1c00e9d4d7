"""Texts in the published forms, good and bad, their vocabulary, the streams that each rank reads, the shipped novel."""

import gzip
import hashlib
import lzma
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data import DataError, text
from bench.data.text import SAMPLE_TEXT, Corpus, Streams, evaluation_streams, load_text
from bench.sample.make_text import chapters, make_text, novels, words

TRAIN = " \n = A b = \n \n a a B c <unk> . \n c a .\n"
VALID = "a b d . \n d\n"
TEST = "c B . e\n"


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in texts.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return folder


def decoded(corpus: Corpus, numbers: np.ndarray) -> str:
    return " ".join(corpus.vocabulary[number] for number in numbers)


# ---- reading


def test_words_in_the_order_of_first_appearance(tmp_path: Path) -> None:
    corpus = load_text(write(tmp_path / "my text", train=TRAIN, valid=VALID, test=TEST))
    assert corpus.vocabulary == ("<eos>", "=", "A", "b", "a", "B", "c", "<unk>", ".")
    assert decoded(corpus, corpus.train) == "<eos> = A b = <eos> <eos> a a B c <unk> . <eos> c a . <eos>"
    assert decoded(corpus, corpus.test) == "a b <unk> . <eos> <unk> <eos>"
    assert corpus.train.dtype == corpus.test.dtype == np.int64
    assert corpus.name == "my text"
    assert corpus.source == (
        "my text (18 + 7 words of the text in a folder, not the published WikiText-2; vocabulary 9; "
        "28.6% of the words tested on are not in it)"
    )


def test_without_the_training_text_the_test_text_is_trained_on(tmp_path: Path) -> None:
    corpus = load_text(write(tmp_path / "t", valid=VALID, test=TEST))
    assert decoded(corpus, corpus.train) == "c B . e <eos>"
    assert corpus.vocabulary == ("c", "B", ".", "e", "<eos>", "<unk>")
    assert decoded(corpus, corpus.test) == "<unk> <unk> <unk> . <eos> <unk> <eos>"
    assert "trained on its test text and tested on its valid text, as the training text isn't there" in corpus.source


def test_without_the_validation_text_the_test_text_is_tested_on(tmp_path: Path) -> None:
    corpus = load_text(write(tmp_path / "t", train=TRAIN, test=TEST))
    assert decoded(corpus, corpus.test) == "c B . <unk> <eos>"


def test_lower_case(tmp_path: Path) -> None:
    corpus = load_text(write(tmp_path / "t", train=TRAIN, valid=VALID), lower=True)
    assert corpus.vocabulary == ("<eos>", "=", "a", "b", "c", "<unk>", ".")
    assert "lower case" in corpus.source


def test_the_most_frequent_words_are_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train="b a a c c d d d\n", valid="a b\n")
    for limit, expected in (
        (2, {"d", "<unk>"}),
        (3, {"a", "d", "<unk>"}),  # a and c occur as often, a came first
        (5, {"a", "c", "d", "b", "<unk>"}),
        (6, {"b", "a", "c", "d", "<eos>", "<unk>"}),
        (99, {"b", "a", "c", "d", "<eos>", "<unk>"}),
    ):
        corpus = load_text(folder, max_vocabulary=limit)
        assert set(corpus.vocabulary) == expected
        sequence = ["b", "a", "a", "c", "c", "d", "d", "d", "<eos>"]
        assert decoded(corpus, corpus.train).split() == [word if word in expected else "<unk>" for word in sequence]
    with pytest.raises(ValueError, match="max_vocabulary must be at least 2, got 1"):
        load_text(folder, max_vocabulary=1)


@pytest.mark.parametrize("names", ["wiki.{}.tokens", "{}.txt"])
@pytest.mark.parametrize(("end", "compress"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress)])
def test_every_form_is_the_same_text(names: str, end: str, compress: type[bytes], tmp_path: Path) -> None:
    expected = load_text(write(tmp_path / "plain", train=TRAIN, valid=VALID, test=TEST))
    folder = tmp_path / "other"
    folder.mkdir()
    for split, content in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        (folder / f"{names.format(split)}{end}").write_bytes(compress(content.encode()))
    corpus = load_text(folder)
    assert corpus.vocabulary == expected.vocabulary
    assert np.array_equal(corpus.train, expected.train)
    assert np.array_equal(corpus.test, expected.test)


def write_zip(path: Path, **texts: str) -> str:
    """Write an archive; returns its MD5."""
    with zipfile.ZipFile(path, "w") as archive:
        for split, content in texts.items():
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", content)
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "wikitext-2-v1.zip"
    md5 = write_zip(path, train=TRAIN, valid=VALID, test=TEST)
    with pytest.raises(DataError, match=rf"wikitext-2-v1\.zip: \d+ bytes with MD5 {md5}, expected MD5 542ccefacc6c"):
        load_text(path)
    monkeypatch.setattr(text, "WIKITEXT2_MD5", md5)
    counts = {"train": 18, "valid": 7, "test": 5}
    monkeypatch.setattr(text, "WIKITEXT2", counts)
    corpus = load_text(path)
    assert np.array_equal(corpus.train, load_text(write(tmp_path / "t", train=TRAIN, valid=VALID)).train)
    assert corpus.name == "WikiText-2"
    assert "18 + 7 words as published" in corpus.source


def test_archive_without_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    monkeypatch.setattr(text, "WIKITEXT2_MD5", write_zip(path, train=TRAIN, valid=VALID))
    with pytest.raises(DataError, match=r"a\.zip: no wikitext-2/wiki\.test\.tokens in it"):
        load_text(path)


@pytest.mark.parametrize("damage", ["cut", "content", "not zip"])
def test_unreadable_archive_of_the_right_checksum(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    write_zip(path, train=TRAIN, valid=VALID, test=TEST)
    data = bytearray(path.read_bytes())
    match damage:
        case "cut":
            data = data[: len(data) // 2]
        case "content":
            data[60] ^= 0xFF
        case "not zip":
            data = bytearray(b"hello")
    path.write_bytes(data)
    monkeypatch.setattr(text, "WIKITEXT2_MD5", hashlib.md5(data).hexdigest())
    with pytest.raises(DataError, match=r"a\.zip: not a readable \.zip archive \("):
        load_text(path)


# ---- bad input


def test_missing_texts(tmp_path: Path) -> None:
    message = r"t: 1 of the texts wiki\.train\.tokens or train\.txt, .*; expected two or three of them, one to test on"
    with pytest.raises(DataError, match=message):
        load_text(write(tmp_path / "t", train=TRAIN))
    with pytest.raises(DataError, match="0 of the texts"):
        load_text(write(tmp_path / "u", notes="hello"))
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; expected wikitext-2-v1\.zip or a folder"):
        load_text(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_texts_without_words(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"valid\.txt: no words, expected a text"):
        load_text(write(tmp_path / "t", train=TRAIN, valid=content))


def test_damaged_texts(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", train=TRAIN)
    (folder / "valid.txt").write_bytes(b"hello \xff\xfe world\n")
    with pytest.raises(DataError, match=r"valid\.txt: not UTF-8 text \(invalid start byte"):
        load_text(folder)
    (folder / "valid.txt").unlink()
    (folder / "valid.txt.xz").write_bytes(lzma.compress(VALID.encode() * 99)[:-30])
    with pytest.raises(DataError, match=r"valid\.txt\.xz: damaged or truncated \.xz file"):
        load_text(folder)


# ---- streams


def numbered(num_train: int, num_test: int = 50) -> Corpus:
    """Each word of the training text is another one."""
    return Corpus("n", "a text (made up)", tuple(map(str, range(num_train))), np.arange(num_train), np.arange(num_test))


@pytest.mark.parametrize(("num_words", "batch_size", "size", "length"), [(100, 3, 2, 4), (97, 1, 1, 96), (30, 2, 5, 1)])
def test_streams_are_contiguous_and_shared_out(num_words: int, batch_size: int, size: int, length: int) -> None:
    corpus = numbered(num_words)
    stream_length = num_words // (size * batch_size)
    ranks = [Streams(corpus, batch_size, rank, size, length=length) for rank in range(size)]
    per_epoch = (stream_length - 1) // length
    for rank, streams in enumerate(ranks):
        assert streams.batches_per_epoch == per_epoch
        for iteration in range(2 * per_epoch):
            given, targets, begins = streams.batch(iteration)
            start = iteration % per_epoch * length
            for column in range(batch_size):
                first = (rank * batch_size + column) * stream_length + start
                assert given[:, column].tolist() == list(range(first, first + length))
                assert targets[:, column].tolist() == list(range(first + 1, first + length + 1))
            assert begins == (start == 0)
            assert given.dtype == targets.dtype == torch.int64


def test_streams_arguments() -> None:
    with pytest.raises(
        DataError, match=r"^10 streams of 10 words and one more need 110 words, but there are 109 in a te"
    ):
        Streams(numbered(109), 5, 0, 2, length=10)
    assert Streams(numbered(110), 5, 0, 2, length=10).batches_per_epoch == 1
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        Streams(numbered(100), 5, length=0)
    with pytest.raises(ValueError, match="rank must be 0 to size - 1, got rank 2 of size 2"):
        Streams(numbered(100), 5, 2, 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(evaluation_streams(numbered(100), 0))
    with pytest.raises(ValueError, match="iteration must be at least 0, got -1"):
        Streams(numbered(100), 2).batch(-1)


def test_the_whole_test_text_is_read_once() -> None:
    batches = list(evaluation_streams(numbered(9, 50), 3, length=6))
    given, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert [len(words) for words, _ in batches] == [6, 6, 3]
    assert given.T.tolist() == [list(range(first, first + 15)) for first in (0, 16, 32)]
    assert torch.equal(targets, given + 1)


# ---- the shipped novel


def test_shipped_novel() -> None:
    corpus = load_text()
    assert corpus.source == (
        "Pride and Prejudice (129,668 + 17,753 words of the novel, in the form of WikiText-2 but not it; "
        "vocabulary 2,901)"
    )
    assert decoded(corpus, corpus.train[:12]) == "= Chapter <unk> = <eos> It is a truth <unk> acknowledged ,"
    counts = np.bincount(corpus.train, minlength=len(corpus.vocabulary))
    assert counts.min() >= 3
    files = [SAMPLE_TEXT / f"{split}.txt.gz" for split in ("train", "valid")]
    assert [hashlib.md5(gzip.decompress(path.read_bytes())).hexdigest() for path in files] == [
        "817db66691e489605976d5d109c9dadf",
        "ce16b116c4c9694e52fd0cc169f2316e",
    ]
    assert sum(path.stat().st_size for path in files) < 300_000
    assert all(path.read_bytes()[4:8] == bytes(4) for path in files)  # no time stamp


def serialised(lines: list[str]) -> bytes:
    """A vector of strings as R's packages have it."""
    strings = b"".join(struct.pack(">II", 0x40009, len(line.encode())) + line.encode() for line in lines)
    return zlib.compress(b"X\n" + bytes(12) + struct.pack(">I5sII", 5, b"UTF-8", 16, len(lines)) + strings)


NOVEL = """A NOVEL

by a writer


CHAPTER I


"Sir," said she, "it's _not_ the writer's well-known
novel--is it?"

Is it not, at 1,000 copies?

Chapter 2

It is it, don't not.
"""


def test_text_is_made_of_a_novel(tmp_path: Path) -> None:
    path = tmp_path / "Rdata.rdb"
    packed = [serialised(["ANOTHER", "", "é"]), serialised(NOVEL.split("\n"))]
    path.write_bytes(b"".join(struct.pack(">I", len(data)) + data for data in packed))
    assert list(novels(path)) == [["ANOTHER", "", "é"], NOVEL.split("\n")]
    assert chapters(NOVEL.split("\n")) == [
        [
            "= CHAPTER I =",
            '" Sir , " said she , " it \'s not the writer \'s well @-@ known novel -- is it ? "',
            "Is it not , at 1,000 copies ?",
        ],
        ["= Chapter 2 =", "It is it , don't not ."],
    ]
    make_text(path, tmp_path, "A NOVEL", 1)
    corpus = load_text(tmp_path)
    assert decoded(corpus, corpus.test) == "<unk> <unk> <unk> <unk> <eos> <unk> <unk> it , <unk> <unk> <unk> <eos>"
    with pytest.raises(DataError, match=r"Rdata\.rdb: no novel that begins with 'PRIDE AND PREJUDICE'"):
        make_text(path, tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"Rdata\.rdb: not an R package's data file"):
        make_text(path, tmp_path)


def test_words_and_signs() -> None:
    assert words("Mrs. Hurst's £5; o'clock, the girls' (1813)") == "Mrs . Hurst 's £ 5 ; o'clock , the girls ' ( 1813 )"
