"""Text as numbered words, and the batches of a recurrent language model.

Text comes as in WikiText-2 and PyTorch's word_language_model example: words between spaces, and the end of each line
counts as the word <eos>. The vocabulary is the training text's, in the order of first appearance; any other word is
<unk>. (For the published WikiText-2 that is the example's vocabulary of 33,278 words, as its other texts have no word
that the training text lacks.)

Batches are cut from contiguous streams. The training text becomes size·batch_size streams of equal length side by side,
of which rank r reads the r-th `batch_size`; an iteration reads the next `length` words of each:

    rank 0   a b c | d e f | g h …      iteration 0: words a b c and i j k, targets b c d and j k l
             i j k | l m n | o p …
    rank 1   q r s | …

so the state of the network after one iteration is where it begins the next, until the epoch ends.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.data.files import find, lines, reading, reading_member
from bench.data.images import SAMPLE
from bench.data.share import DataError, check_share

Words = npt.NDArray[np.int64]

END, UNKNOWN = "<eos>", "<unk>"
#: What a text's file is called: in the published archive, and in PyTorch's example.
NAMES = {split: (f"wiki.{split}.tokens", f"{split}.txt") for split in ("train", "valid", "test")}
#: Words of WikiText-2 with the ends of lines (Merity et al. 2017, table 1): by them its texts are recognised.
WIKITEXT2 = {"train": 2_088_628, "valid": 217_646, "test": 245_569}
WIKITEXT2_MD5 = "542ccefacc6c27f945fb54453812b3cd"
SAMPLE_TEXT = SAMPLE / "text"


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text to train on and one to test on.

    Attributes:
        name: the name of the data set, such as 'WikiText-2'.
        source: what exactly was used, for people to read beside the results.
        vocabulary: the words by number.
        train: numbers of the words, int64 of shape (num_train,).
        test: the test text, in the same form.
    """

    name: str
    source: str
    vocabulary: tuple[str, ...]
    train: Words
    test: Words


def load_text(
    spec: str | os.PathLike[str] | None = None, *, lower: bool = False, max_vocabulary: int | None = None
) -> Corpus:
    """Read texts into memory.

    The model is trained on the training text and tested on the validation text, as in PowerSGD's and so Sahu et al.'s
    code. Where there is no training text it is trained on the test text, which `source` then says.

    Args:
        spec: None for the shipped sample, a novel; otherwise the path of the published wikitext-2-v1.zip, or of a
            folder with its files (wiki.train.tokens, …) or those of PyTorch's example (train.txt, …), which may be
            compressed (.gz, .bz2, .xz). Two of the three texts are enough.
        lower: whether to take all words in lower case (as that code does).
        max_vocabulary: keep only as many words, the most frequent ones (<unk> is one of them); None for all.
    Raises:
        DataError: if texts are missing, damaged or empty.
        ValueError: if max_vocabulary is below 2.
    """
    if max_vocabulary is not None and max_vocabulary < 2:
        raise ValueError(f"max_vocabulary must be at least 2, got {max_vocabulary}")
    where = SAMPLE_TEXT if spec is None else Path(spec)
    texts = _read(where, lower)
    train = "train" if "train" in texts else "test"
    test = "valid" if "valid" in texts else "test"
    if len(texts) < 2:
        expected = ", ".join(" or ".join(NAMES[split]) for split in NAMES)
        raise DataError(f"{where}: {len(texts)} of the texts {expected}; expected two or three of them, one to test on")

    vocabulary = _vocabulary(texts[train], max_vocabulary)
    numbers = {word: number for number, word in enumerate(vocabulary)}
    unknown = numbers[UNKNOWN]
    encoded = {
        split: np.array([numbers.get(word, unknown) for word in texts[split]], np.int64) for split in (train, test)
    }

    published = all(len(texts[split]) == WIKITEXT2[split] for split in texts)
    if spec is None:
        name = "Pride and Prejudice"
        what = "of the novel, in the form of WikiText-2 but not it"
    else:
        name = "WikiText-2" if published else where.name
        what = "as published" if published else "of the text in a folder, not the published WikiText-2"
    if train == "test":
        what += "; trained on its test text and tested on its valid text, as the training text isn't there"
    details = [f"{len(encoded[train]):,} + {len(encoded[test]):,} words {what}", f"vocabulary {len(vocabulary):,}"]
    if lower:
        details.append("lower case")
    missing = sum(word not in numbers for word in texts[test])
    if missing:
        details.append(f"{missing / len(texts[test]):.1%} of the words tested on are not in it")
    return Corpus(name, f"{name} ({'; '.join(details)})", vocabulary, encoded[train], encoded[test])


def _read(where: Path, lower: bool) -> dict[str, list[str]]:
    """The words of each text that is there."""
    texts = {}
    if where.is_dir():
        for split, names in NAMES.items():
            path = next((path for name in names if (path := find(where, name))), None)
            if path is not None:
                with reading(path) as stream:
                    texts[split] = _words(lines(stream, f"{path}"), f"{path}", lower)
    elif where.is_file():
        for split, (name, _) in NAMES.items():
            member = f"wikitext-2/{name}"
            with reading_member(where, {WIKITEXT2_MD5: "wikitext-2-v1.zip"}, member) as stream:
                texts[split] = _words(lines(stream, f"{where}: {member}"), f"{where}: {member}", lower)
    else:
        raise DataError(f"{where}: no such file or folder; expected wikitext-2-v1.zip or a folder with its files")
    return texts


def _words(text: Iterator[str], where: str, lower: bool) -> list[str]:
    words = [word for line in text for word in (*(line.lower() if lower else line).split(), END)]
    if len(set(words)) < 2:
        raise DataError(f"{where}: no words, expected a text")
    return words


def _vocabulary(words: list[str], limit: int | None) -> tuple[str, ...]:
    counts = Counter(words)  # in the order of first appearance, which `most_common` keeps among equals
    counts.setdefault(UNKNOWN, 0)
    if limit is None or len(counts) <= limit:
        return tuple(counts)
    frequent = [word for word, _ in counts.most_common() if word != UNKNOWN]
    kept = {UNKNOWN, *frequent[: limit - 1]}
    return tuple(word for word in counts if word in kept)


class Streams:
    """The training batches of one rank: a function of the iteration, with no state to save but the network's own.

    Args:
        corpus: whose training text is read.
        batch_size: streams per rank.
        rank: the rank of the caller, 0 … size - 1.
        size: number of ranks.
        length: words of each stream in an iteration, which gradients flow back through. What is left at the end of an
            epoch, less than that, is dropped.
        device: where the batches are put.
    Raises:
        DataError: if the text is too short for one iteration.
        ValueError: if another argument is outside its bounds.

    Attributes:
        batches_per_epoch: iterations until the streams end.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int,
        rank: int = 0,
        size: int = 1,
        *,
        length: int = 30,
        device: str | torch.device = "cpu",
    ) -> None:
        check_share(batch_size, rank, size)
        streams = _side_by_side(corpus.train, size * batch_size, length, corpus.source)
        self.batches_per_epoch = (len(streams) - 1) // length
        self.length = length
        self._streams = streams[:, rank * batch_size : (rank + 1) * batch_size].contiguous().to(device)

    def batch(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """The batch of an iteration, counted from 0 over all epochs.

        Returns:
            Words and the words that follow them, int64 of shape (length, batch_size) both; and whether an epoch begins,
            where the network begins with its initial state.
        """
        if iteration < 0:
            raise ValueError(f"iteration must be at least 0, got {iteration}")
        position = iteration % self.batches_per_epoch
        start = position * self.length
        stop = start + self.length
        return self._streams[start:stop], self._streams[start + 1 : stop + 1], position == 0


def evaluation_streams(
    corpus: Corpus, batch_size: int, *, length: int = 30, device: str | torch.device = "cpu"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The test text in `batch_size` streams, from its beginning to its end; the last batch may be shorter.

    Yields:
        Words and the words that follow them, int64 of shape (up to length, batch_size) both.
    Raises:
        DataError: if the text is too short.
        ValueError: if an argument is outside its bounds.
    """
    check_share(batch_size, 0, 1)
    streams = _side_by_side(corpus.test, batch_size, length, corpus.source).to(device)
    for start in range(0, len(streams) - 1, length):
        stop = min(start + length, len(streams) - 1)
        yield streams[start:stop], streams[start + 1 : stop + 1]


def _side_by_side(words: Words, num_streams: int, length: int, source: str) -> torch.Tensor:
    """int64 of shape (len(words) // num_streams, num_streams); a DataError where not even `length` + 1 words fit."""
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    stream_length = len(words) // num_streams
    if stream_length <= length:
        raise DataError(
            f"{num_streams} streams of {length} words and one more need {num_streams * (length + 1):,} words, "
            f"but there are {len(words):,} in {source}"
        )
    return torch.from_numpy(words[: num_streams * stream_length].reshape(num_streams, stream_length).T.copy())
