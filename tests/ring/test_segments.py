"""Where vectors are cut."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring.segments import CHUNK_ELEMENTS, PayloadMap, Region, cut_segments

regions_of_all_kinds = st.lists(
    st.builds(
        Region,
        length=st.integers(0, 200),
        unit=st.integers(1, 50),
        unit_bytes=st.integers(0, 64),
        tail_bytes=st.integers(0, 64),
    ),
    max_size=5,
)


@given(regions_of_all_kinds, st.integers(1, 9), st.integers(1, 300))
def test_chunks_cover_the_vector_once_and_in_order(regions: list[Region], size: int, chunk_bytes: int) -> None:
    segments = cut_segments(regions, size, chunk_bytes)
    assert len(segments) == size
    element = byte = 0
    for chunk in (chunk for segment in segments for chunk in segment):
        assert (chunk.start, chunk.first_byte) == (element, byte)
        assert chunk.stop > chunk.start
        element, byte = chunk.stop, chunk.last_byte
    assert element == sum(region.length for region in regions)
    assert byte == sum(region.num_bytes for region in regions)


@given(regions_of_all_kinds, st.integers(1, 9))
def test_cuts_lie_between_units(regions: list[Region], size: int) -> None:
    allowed, offset = {0}, 0
    for region in regions:
        allowed |= set(range(offset, offset + region.length, region.unit)) | {offset + region.length}
        offset += region.length
    for segment in cut_segments(regions, size, 64):
        assert all(chunk.start in allowed and chunk.stop in allowed for chunk in segment)


@given(regions_of_all_kinds, st.integers(1, 9))
def test_payloads_differ_by_at_most_a_unit_at_either_end(regions: list[Region], size: int) -> None:
    largest_unit = max((max(region.unit_bytes, region.tail_bytes) for region in regions if region.length), default=0)
    loads = [sum(chunk.num_bytes for chunk in segment) for segment in cut_segments(regions, size, 1 << 30)]
    assert max(loads) - min(loads) <= 2 * largest_unit + 1


def test_compressed_and_uncompressed_parts_are_balanced_by_bytes() -> None:
    # 8000 elements at ratio 8 and 1000 at 1: equal cuts of the vector would put 4/6 of the bytes on the last worker.
    loads = [
        sum(chunk.num_bytes for chunk in segment)
        for segment in cut_segments([Region(8000, 8, 4), Region(1000, 1, 4)], 6, 1 << 20)
    ]
    assert sum(loads) == 8000
    assert max(loads) - min(loads) <= 4


@given(regions_of_all_kinds, st.integers(0, 20000))
def test_cut_near_is_the_nearest(regions: list[Region], byte: int) -> None:
    payload = PayloadMap(regions)
    cuts, offset = [0], 0
    for region in regions:
        cuts += [*range(offset, offset + region.length, region.unit), offset + region.length]
        offset += region.length
    nearest = min(abs(payload.byte_at(cut) - byte) for cut in cuts)
    assert abs(payload.byte_at(payload.cut_near(byte)) - byte) == nearest


def test_bounds_are_checked() -> None:
    with pytest.raises(ValueError, match="must ascend from 0 to 10 in 3 numbers"):
        cut_segments([Region(10, 1, 4)], 2, 64, bounds=[0, 11, 10])
    assert [len(segment) for segment in cut_segments([Region(10, 1, 4)], 2, 64, bounds=[0, 0, 10])] == [0, 1]


def test_a_region_with_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="length >= 0"):
        Region(-1, 1, 4)


def test_what_is_compressed_is_cut_by_elements_as_well() -> None:
    length = 6 * 700_000
    plain, eighth = [Region(length, 1, 4)], [Region(length, 256, 128, 128)]
    most = 512 * 1024
    assert max(chunk.stop - chunk.start for row in cut_segments(plain, 6, most) for chunk in row) * 4 <= most
    rows = cut_segments(eighth, 6, most)
    assert {len(row) for row in rows} == {3}
    assert max(chunk.stop - chunk.start for row in rows for chunk in row) <= CHUNK_ELEMENTS
    # Whoever asks for large messages gets them: plain ones of two bytes an element, and one for each segment.
    assert {len(row) for row in cut_segments([Region(length, 1, 2)], 6, 4 << 20)} == {1}
    assert {len(row) for row in cut_segments(eighth, 6, sys.maxsize)} == {1}
