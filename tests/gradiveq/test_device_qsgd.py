"""QSGD's kernels: in Triton's interpreter against the host's loops, and compiled for cards that needn't be there.

`test_gpu` runs them compiled. The interpreter is for one thread at a time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.kernels import device as bench_device
from gradiveq import QSGDRing
from gradiveq.exchange.family import Family
from gradiveq.over_ring.driver import RingDriver
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.over_ring.staging import Lane
from ring.codec import Hop
from tests.support.aggregators import noise
from tests.support.on_devices import CPU, assert_bitwise, both
from tests.support.processes import Launch

pytest.importorskip("triton", reason="Triton is for Linux")

from gradiveq.over_ring import qsgd_triton, staged_qsgd

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def payload_of(codec: QSGD, values: Any, start: int, hop: Hop, incoming: Any = None) -> Any:
    """By the host."""
    out = np.empty(sum(region.num_bytes for region in codec.regions(len(values), values.dtype)), np.uint8)
    if incoming is None:
        codec.encode(values, start, out, hop)
    else:
        codec.reduce(incoming, values, start, out, hop)
    return out


def values_of(length: int, seed: int, kind: str) -> Any:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(length).astype(np.float32)
    if kind == "of all magnitudes":
        return np.ldexp(values, generator.integers(-140, 120, length)).astype(np.float32)
    if kind == "special":
        special = np.array([0, -0.0, 1e-45, -3e-39, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan], np.float32)
        return np.where(generator.random(length) < 0.02, generator.choice(special, length), values)
    return np.zeros_like(values) if kind == "zero" else values


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from([2, 4, 8]),
    bucket=st.sampled_from([1, 7, 64, 512, 1000]),
    buckets=st.floats(0.01, 3),
    first=st.integers(0, 2**62),
    kind=st.sampled_from(["normal", "of all magnitudes", "special", "zero"]),
    seed=st.integers(0, 2**32),
)
def test_kernels_give_the_hosts_bits(bits: int, bucket: int, buckets: float, first: int, kind: str, seed: int) -> None:
    codec = QSGD(bits, bucket, "max", seed=seed, call=3)
    values, others = (values_of(max(1, int(buckets * bucket)), seed + i, kind) for i in range(2))
    start, hop = first // bucket * bucket, Hop(2, 5, 1)
    sent = payload_of(codec, values, start, hop)
    base = int(codec.key(hop)) + start
    words = torch.zeros(len(sent) // 4, dtype=torch.int32, device=DEVICE)
    qsgd_triton.recode(None, torch.from_numpy(values).to(DEVICE), base, codec, words)
    np.testing.assert_array_equal(words.cpu().numpy(), sent.view(np.int32))

    with np.errstate(all="ignore"):
        passed_on = payload_of(codec, others, start, hop, incoming=sent)
    qsgd_triton.recode(words, torch.from_numpy(others).to(DEVICE), base, codec, words)  # in place
    np.testing.assert_array_equal(words.cpu().numpy(), passed_on.view(np.int32))

    expected, got = np.empty_like(values), torch.empty(len(values), device=DEVICE)
    codec.decode(passed_on, start, expected, 3)
    expected /= 3
    qsgd_triton.decode(words, codec, got, 3)
    np.testing.assert_array_equal(got.cpu().numpy(), expected)


def test_an_l2_norm_is_the_hosts_within_rounding() -> None:
    codec, hop = QSGD(4, 512, "l2"), Hop(0, 2, 0)
    for kind in ("normal", "of all magnitudes", "special"):
        values = values_of(1100, 0, kind)
        sent = payload_of(codec, values, 0, hop).view(np.int32).reshape(-1)
        words = torch.zeros(len(sent), dtype=torch.int32, device=DEVICE)
        qsgd_triton.recode(None, torch.from_numpy(values).to(DEVICE), int(codec.key(hop)), codec, words)
        got = words.cpu().numpy()
        norms = [one[:: 1 + 64].view(np.float32) for one in (got, sent)]
        np.testing.assert_allclose(*norms, rtol=2e-7)
        assert (got != sent).mean() < 0.02  # a code may change with the last bit of its norm


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of any size are quantised on the device, by one thread at a time."""
    monkeypatch.setattr(staged_qsgd, "FROM_ELEMENTS", 1)
    lock = threading.Lock()

    def locked(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with lock:
                function(*args)

        return call

    for name in ("recode", "decode"):
        monkeypatch.setattr(qsgd_triton, name, locked(getattr(qsgd_triton, name)))


@pytest.mark.usefixtures("lane", "on_device")
@pytest.mark.parametrize(
    ("method", "size", "chunk_bytes"),
    [
        (QSGDRing(bucket=16), 3, 24),
        (QSGDRing(bucket=16, pipelined=False), 2, None),
        (QSGDRing(bits=8, bucket=7), 1, 64),
    ],
)
def test_the_mean_is_the_hosts_bit_by_bit(
    method: QSGDRing, size: int, chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    asked = RingDriver.on_device

    def noted(self: RingDriver, family: Family) -> bool:
        used.append(asked(self, family))
        return used[-1]

    monkeypatch.setattr(RingDriver, "on_device", noted)
    assert_bitwise(*both(method, 2, noise, size=size, chunk_bytes=chunk_bytes))
    half = len(used) // 2
    assert used == [False] * half + [True] * half
    assert half >= size


def test_where_the_host_is_ahead() -> None:
    """Or the only one that can: a bucket has to fit into the registers of one program."""
    enough = staged_qsgd.FROM_ELEMENTS
    assert staged_qsgd.pays(QSGD(), enough, DEVICE)
    assert not staged_qsgd.pays(QSGD(), enough - 1, DEVICE)
    assert not staged_qsgd.pays(QSGD(bucket=qsgd_triton.MOST_OF_A_BUCKET + 1), enough, DEVICE)


def test_no_float_crosses_the_bus(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies are of the payload: int32, once there and once back at each hop."""
    copied: list[tuple[str, torch.dtype, int]] = []

    class Counting(Lane):
        def fetch(self, host: Any, source: Any) -> Any:
            copied.append(("to the host", source.dtype, source.nbytes))
            return super().fetch(host, source)

        def push(self, target: Any, host: Any) -> None:
            copied.append(("to the device", host.dtype, host.nbytes))
            super().push(target, host)

    monkeypatch.setattr("gradiveq.over_ring.staging.Lane", Counting)
    size = 2
    both(QSGDRing(bucket=16), 1, noise, size=size)
    assert {dtype for _, dtype, _ in copied} == {torch.int32}
    totals = {way: sum(num_bytes for what, _, num_bytes in copied if what == way) for way, _, _ in copied}
    # A worker encodes its segment and recodes another one; it gets that one, and all that are finished.
    assert totals["to the device"] == pytest.approx(1.5 * totals["to the host"], rel=0.1)


def test_compiled_for_cards_that_are_not_here(mpirun: Launch) -> None:
    """To machine code, without fused or flushing arithmetic, which would round in another way than the host's."""
    program = """
    import os, re
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.backends.compiler import GPUTarget
    from gradiveq.over_ring import qsgd_triton

    recode = {"incoming": "*i32", "values": "*fp32", "outgoing": "*i32", "base": "i64", "length": "i64"}
    decode = {"incoming": "*i32", "values": "*fp32", "length": "i64", "divisor": "fp32"}
    form = {"BITS": 4, "BUCKET": 512, "WORDS": 64}
    for capability in (70, 80, 90):
        for kernel, arguments, constants in (
            (qsgd_triton._recode_kernel, recode, form | {"HAS_INCOMING": True, "L2": False}),
            (qsgd_triton._decode_kernel, decode, form),
        ):
            signature = arguments | dict.fromkeys(constants, "constexpr")
            compiled = triton.compile(
                triton.compiler.ASTSource(kernel, signature, constants),
                target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": False},
            )
            assert len(compiled.asm["cubin"]) > 1000
            text = compiled.asm["ptx"]
            divisions = set(re.findall(r"div[.]\\S+", text))
            assert divisions == {"div.rn.f32"}, divisions
            assert not re.search("fma|ftz|approx|[.]local", text)
    """
    result = mpirun(1, program)
    assert result.returncode == 0, result.stderr


@pytest.mark.usefixtures("on_device")
def test_the_benchmark_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_device, "SAMPLE_S", 1e-5)
    monkeypatch.setattr(bench_device, "SLICE_SIZES", (64,))
    size = ["--elements", "2048", "--square", "32", "--repeats", "2"]
    bench_device.main(["--device", DEVICE.type, *size, "--out", str(tmp_path)])
    rows = {row["operation"]: row["bytes"] for row in json.loads((tmp_path / "device.json").read_text())["rows"]}
    assert rows["QSGD: decode, add, encode"] == 4 * 2048 + 2 * 4 * 260
    assert rows["QSGD: decode"] == 4 * 260 + 4 * 2048
    assert rows["exchange: QSGD"] == 2 * rows["QSGD: decode"]
