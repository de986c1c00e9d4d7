"""What `bench.ddp` compares: methods as texts, the bytes that they send, and settings at which these are equal.

    torch:none                  DistributedDataParallel without a hook
    torch:fp16, torch:bf16      PyTorch's hooks that cast
    torch:powersgd:RANK         PyTorch's PowerSGD hook
    rar                         `gradiveq.ddp` without compression
    gradiveq:FIELD=VALUE:...    `gradiveq.methods.GradiVeQ`; its warm-up is as long as anybody's unless it is said
    any other text              as `gradiveq.specs` reads it, by `gradiveq.ddp`

A "?" in a text stands for a number: that at which the method's bytes over the whole run, uncompressed iterations and
bases included, come closest to what is wanted.

Bytes *sent* are those that a rank puts on its link: 2(N-1)/N of what is summed, N-1 times what is gathered, and on
average (N-1)/N of what is broadcast. With two ranks that is what they hand to the process group.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from gradiveq.compressors.base import Compressor
from gradiveq.ddp.methods import DDPMethod
from gradiveq.exchange.flaws import CODE_BYTES
from gradiveq.flatten import Block, Layout, slice_sizes
from gradiveq.methods import Compressed, GradiVeQ, Plain
from gradiveq.pca import check_components, groups
from gradiveq.powersgd import PowerSGD
from gradiveq.sizes import Handed, bases_handed, handed
from gradiveq.specs import parse, settled

TORCH = "torch:"
#: What all others are compared with.
PLAIN = "torch:none"
#: Bytes of an element as PyTorch's hooks that only cast send it.
CASTS = {"torch:none": 4, "torch:fp16": 2, "torch:bf16": 2}
TORCH_POWERSGD = "torch:powersgd"
#: PyTorch's hook compresses a matrix that becomes more than so many times smaller.
TORCH_MIN_RATE = 2.0
#: What a "?" may stand for: ranks of PowerSGD, ratios of GradiVeQ, and fractions of all others.
MOST_RANK = 256
RATIOS, FRACTIONS = (1.0, 1e4), (1e-5, 1.0)
#: Significant digits of a setting that isn't a whole number.
DIGITS = 3
#: What is further than this from the bytes that are wanted is not compared at equal bytes.
TOLERANCE = 0.12


@dataclass(frozen=True)
class Length:
    """How long a run is, and on how many ranks.

    Attributes:
        iterations: iterations of the run.
        start: iterations at the beginning that no method compresses.
        ranks: how many.
    """

    iterations: int
    start: int
    ranks: int


def blocks_of(model: nn.Module) -> list[Block]:
    """The model's parameters as `gradiveq.flatten` sees them: which are convolutions, and their shapes."""
    return list(Layout(model).blocks)


def method_of(text: str, start: int) -> DDPMethod | None:
    """What `gradiveq.ddp.State` is to be made of; None for PyTorch's own.

    Unless the text says otherwise, GradiVeQ's warm-up ends at `start`, and it measures no held-out losses: they cost an
    exact all-reduce each.

    Raises:
        ValueError: there is no such method, or a process group can't carry it.
    """
    name, *settings = text.split(":")
    if text.startswith(TORCH):
        if text in CASTS:
            return None
        rank = text.removeprefix(f"{TORCH_POWERSGD}:")
        if not text.startswith(f"{TORCH_POWERSGD}:") or not rank.isdigit() or int(rank) < 1:
            known = ", ".join(CASTS)
            raise ValueError(f"method {text!r}: those of PyTorch are {known} and {TORCH_POWERSGD}:RANK, RANK from 1 on")
        return None
    if name == GradiVeQ.name:
        given = {setting.partition("=")[0] for setting in settings}
        settings += [
            default for default in (f"warmup={start}", "holdout_every=0") if default.split("=")[0] not in given
        ]
        try:
            return settled(GradiVeQ, settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {text!r}: {error}") from error
    method = parse(text)
    if not isinstance(method, Plain | Compressor | Compressed | PowerSGD):
        raise ValueError(f"method {text!r}: a process group's collectives can't carry it out (gradiveq.ddp says why)")
    return method


def iteration_bytes(text: str, blocks: Sequence[Block]) -> Handed:
    """Handed over in a compressed iteration, without the few bytes of codes in sums. Upper bounds where sizes vary."""
    elements = sum(block.length for block in blocks)
    if text in CASTS:
        return Handed(all_reduce=CASTS[text] * elements)
    method = method_of(text, 0)
    if method is None:
        method = PowerSGD(int(text.rpartition(":")[2]), min_compression_rate=TORCH_MIN_RATE)
    # As the hook has them: no convolution in the order of Fig. 3a, but for GradiVeQ.
    as_stored = blocks if isinstance(method, GradiVeQ) else [replace(block, compressed=False) for block in blocks]
    found = handed(method, as_stored)
    return found.plus(Handed(all_gather=CODE_BYTES)) if found.all_gather else found


def run_bytes(text: str, blocks: Sequence[Block], length: Length) -> Handed:
    """Handed over per iteration in the mean over a run.

    Raises:
        ValueError: there is no such method, or it doesn't fit the model or the run.
    """
    dense = Handed(all_reduce=4.0 * sum(block.length for block in blocks))
    method = method_of(text, length.start)
    uncompressed, bases = min(length.start, length.iterations), Handed()
    if isinstance(method, GradiVeQ):
        if method.sample == "auto" or method.compress == "auto":
            raise ValueError(f"method {text!r}: `sample` and `compress` must be numbers, or bytes aren't known before")
        _check(method, method.sample, blocks)
        uncompressed = min(max(uncompressed, method.warmup), length.iterations)
        whole, rest = divmod(length.iterations - uncompressed, method.sample + method.compress)
        uncompressed += whole * method.sample + min(rest, method.sample)
        windows = whole + (rest > method.sample)
        bases = bases_handed(method, blocks, method.sample).times(windows)
    compressed = iteration_bytes(text, blocks).times(length.iterations - uncompressed)
    return dense.times(uncompressed).plus(compressed).plus(bases).times(1 / length.iterations)


def _check(method: GradiVeQ, samples: int, blocks: Sequence[Block]) -> None:
    for block, k in _sliced(method, blocks):
        for group in groups(block.name, block.length, k, method.pca.reuse):
            check_components(group, samples, method.pca)


def _sliced(method: GradiVeQ, blocks: Sequence[Block]) -> list[tuple[Block, int]]:
    sizes = slice_sizes(blocks, method.slice_size)
    return [(block, sizes[block.name]) for block in blocks if block.compressed]


# --- equal bytes -----------------------------------------------------------------------------------------------------


def filled(template: str, wanted: float, sent: Callable[[str], float]) -> str:
    """The text whose bytes are closest to those wanted, as near as whole numbers or `DIGITS` digits come.

    Args:
        template: with one "?".
        sent: bytes of a text, which fall or rise with the number; raises ValueError where there is no such method.
    Raises:
        ValueError: no number fits.
    """
    if template.count("?") != 1:
        raise ValueError(f"method {template!r}: one ? may stand for a number, got {template.count('?')}")
    numbers = _numbers(template)

    def bytes_of(index: int) -> float:
        try:
            return sent(template.replace("?", numbers[index]))
        except ValueError:
            return math.inf

    rising = bytes_of(len(numbers) - 1) > bytes_of(0)
    order = range(len(numbers)) if rising else range(len(numbers) - 1, -1, -1)
    place = bisect_left(order, wanted, key=bytes_of)
    near = [order[i] for i in (place - 1, place) if 0 <= i < len(numbers)]
    closest = bytes_of(min(near, key=lambda index: abs(bytes_of(index) - wanted)))
    # of several with the same bytes the one that compresses least, as it is written
    best = template.replace("?", numbers[order[bisect_right(order, closest, key=bytes_of) - 1]])
    sent(best)  # raises if none of them is one
    return best


def _numbers(template: str) -> list[str]:
    """What the "?" may be, rising."""
    if PowerSGD.name in template:
        return [str(rank) for rank in range(1, MOST_RANK + 1)]
    least, most = RATIOS if template.startswith(GradiVeQ.name) else FRACTIONS
    first, last = round(math.log10(least)), round(math.log10(most))
    tens = 10 ** (DIGITS - 1)
    numbers = (mantissa / tens * 10**e for e in range(first, last) for mantissa in range(tens, 10 * tens))
    return [*(f"{number:.{DIGITS}g}" for number in numbers), f"{most:g}"]


@dataclass(frozen=True)
class Entry:
    """A method that is run.

    Attributes:
        text: without a "?".
        ratio: ratio of the group that it is compared in at equal bytes: 8 for an eighth of plain DDP's. None for none.
        expected: its bytes sent over the run, as a multiple of those that the group has; of plain DDP's without one.
    """

    text: str
    ratio: float | None
    expected: float


def entries(
    templates: Sequence[str], ratios: Sequence[float], blocks: Sequence[Block], length: Length
) -> tuple[list[Entry], list[str]]:
    """All methods, those with a "?" once for each ratio, and those that have about a group's bytes already in it.

    Returns:
        (the methods; what had to be left out, as no number comes near the bytes that are wanted, a line each).
    Raises:
        ValueError: a text is no method, or two are the same.
    """

    def sent(text: str) -> float:
        return run_bytes(text, blocks, length).sent(length.ranks)

    plain = sent(PLAIN)
    found: dict[str, Entry] = {}
    left_out = []
    for template in templates:
        wanted = list(ratios) if "?" in template else [None]
        for ratio in wanted:
            text = template if ratio is None else filled(template, plain / ratio, sent)
            share = sent(text) / plain
            if ratio is not None and not _near(share, ratio):
                left_out.append(f"{template} at 1/{ratio:g}: the nearest, {text}, sends 1/{1 / share:.1f}")
                continue
            if text in found:
                raise ValueError(f"--methods: {text!r} comes twice")
            ratio = next((one for one in ratios if _near(share, one)), None) if ratio is None else ratio
            found[text] = Entry(text, ratio, share * (ratio or 1.0))
    return list(found.values()), left_out


def _near(share: float, ratio: float) -> bool:
    return abs(share * ratio - 1) <= TOLERANCE
