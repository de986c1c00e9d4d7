"""What a compressor is applied to at once: each layer, groups of them, or the entire model (Dutta et al. 2020).

A layer is one parameter's gradient, a block of the `Layout`. Patterns are those of file names (`fnmatch`): `layer1.*`,
`*.bias`; they tell case.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from gradiveq.compressors.base import Compressor
from gradiveq.flatten import Block

#: A pattern, and the compressor of what it matches.
Override = tuple[str, Compressor]


class Part(NamedTuple):
    """Elements start ... stop of a vector, compressed at once.

    Attributes:
        key: what its random numbers are keyed by.
    """

    name: str
    start: int
    stop: int
    compressor: Compressor
    key: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def where(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def summed(self) -> bool:
        """Whether its payloads are added; else they are gathered."""
        return self.compressor.collective == "all_reduce"


def worth_compressing(dense_bytes: int, payload_bytes: int, min_ratio: float = 1.0) -> bool:
    """Whether a layer is compressed or goes as it is: if it becomes `min_ratio` times smaller at least.

    A payload as long as the layer is worth it by default: 32-bit integers are what a switch can add.
    """
    return dense_bytes >= min_ratio * payload_bytes


def check_parts(parts: Sequence[Part], length: int) -> None:
    """Refuse parts that don't cover a vector in order, without gaps.

    Raises:
        ValueError: names the part.
    """
    place = 0
    for part in parts:
        if part.start != place or part.stop < part.start:
            raise ValueError(f"part {part.name} must begin at element {place}, where the last one ends, got {part}")
        place = part.stop
    if place != length:
        raise ValueError(f"the parts must cover {length} elements, got {place}")


def layer_parts(blocks: Sequence[Block], compressor: Compressor, overrides: Sequence[Override] = ()) -> list[Part]:
    """A part for each layer.

    Args:
        blocks: of a layout.
        compressor: of all layers that no pattern matches.
        overrides: another one for some of them; the identity to leave them alone.
    Raises:
        ValueError: a pattern matches nothing, or two match the same layer.
    """
    return _with_overrides(
        [Part(block.name, block.start, block.stop, compressor, block.index) for block in blocks], overrides
    )


def model_parts(blocks: Sequence[Block], compressor: Compressor) -> list[Part]:
    """One part for all layers."""
    return [Part("model", 0, blocks[-1].stop if blocks else 0, compressor)]


def group_parts(
    blocks: Sequence[Block], compressor: Compressor, groups: Sequence[str], overrides: Sequence[Override] = ()
) -> list[Part]:
    """A part for each group, by the name of its pattern, and one for each layer that is in none.

    Args:
        blocks: of a layout that was made with the same `groups`, so that each group's layers stand together.
        groups: a pattern for each.
        overrides: as for `layer_parts`; a group is matched by its own pattern as well.
    Raises:
        ValueError: a pattern matches nothing, two match the same layer, or a group's layers don't stand together.
    """
    claims = _claims([block.name for block in blocks], groups)
    parts: list[Part] = []
    for block in blocks:
        name = claims.get(block.name, block.name)
        if parts and parts[-1].name == name:
            parts[-1] = parts[-1]._replace(stop=block.stop)
        elif name in groups and any(part.name == name for part in parts):
            raise ValueError(
                f"group {name!r} must be of layers that stand together in the vector, but {parts[-1].name} is between "
                f"them and {block.name}: make the Layout with the same `groups`"
            )
        else:
            parts.append(Part(name, block.start, block.stop, compressor, len(parts)))
    return _with_overrides(parts, overrides)


def _with_overrides(parts: Sequence[Part], overrides: Sequence[Override]) -> list[Part]:
    claims = _claims([part.name for part in parts], [pattern for pattern, _ in overrides])
    compressors = dict(overrides)
    return [part._replace(compressor=compressors[claims[part.name]]) if part.name in claims else part for part in parts]


def _claims(names: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    """The pattern that matches each name, of those that one does."""
    claims: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise ValueError(f"pattern {pattern!r} matches no layer; the {len(names)} layers are {shown}")
        for name in matched:
            if name in claims:
                raise ValueError(f"layer {name} is matched by two patterns, {claims[name]!r} and {pattern!r}")
            claims[name] = pattern
    return claims
