"""The recorder of gradients, and the numbers of Fig. 4 and 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.models import resnet_cifar
from bench.papers.gradiveq import recorded_gradients as gradients
from bench.papers.gradiveq.recorded_gradients import GradientRecorder, Recording
from gradiveq.flatten import Layout

ABOUT: dict[str, Any] = {
    "data": "made up",
    "seed": 0,
    "ranks": 1,
    "batch_size": 4,
    "first_iteration": 10,
    "command": "pytest",
}


def give_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_order_is_that_of_the_flattening(tmp_path):
    model = resnet_cifar(8, 10)
    recorder = GradientRecorder(model, ["conv1", "layer2.0.conv1"], 3)
    layout = Layout(model)
    blocks = {block.name: block for block in layout.blocks}
    expected: dict[str, list[np.ndarray]] = {"conv1": [], "layer2.0.conv1": []}
    for iteration in range(3):
        give_gradients(model, iteration)
        assert recorder.add()
        vector = np.empty(layout.length, np.float32)
        layout.pack(vector)
        for name, rows in expected.items():
            block = blocks[f"{name}.weight"]
            rows.append(vector[block.start : block.stop])
    recorder.save(tmp_path / "g.npz", ABOUT)
    recording = gradients.load(tmp_path / "g.npz")
    assert recording.shapes == {"conv1": (3, 3, 3, 16), "layer2.0.conv1": (3, 3, 16, 32)}
    assert recording.about == ABOUT
    for name, rows in expected.items():
        np.testing.assert_array_equal(recording.gradients[name], np.stack(rows))
    # Fig. 3a, said again: the F filters at (h, w, d) stand together
    weight = model.layer2[0].conv1.weight.grad.numpy()
    h, w, d, f = 2, 1, 5, 7
    assert recording.gradients["layer2.0.conv1"][2][((h * 3 + w) * 16 + d) * 32 + f] == weight[f, d, h, w]


def test_stops_at_count_and_leaves_gradients_alone():
    model = resnet_cifar(8, 10)
    recorder = GradientRecorder(model, ["conv1"], 2)
    give_gradients(model, 1)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    assert [recorder.add() for _ in range(4)] == [True, True, False, False]
    assert recorder.complete
    assert recorder.recorded == 2
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_goes_on_after_an_interruption(tmp_path):
    model = resnet_cifar(8, 10)
    whole, first, second = (GradientRecorder(model, ["conv1"], 4) for _ in range(3))
    for iteration in range(4):
        give_gradients(model, iteration)
        whole.add()
        (first if iteration < 2 else second).add()
        if iteration == 1:
            second.load_state_dict(first.state_dict())
    for recorder, name in ((whole, "a.npz"), (second, "b.npz")):
        recorder.save(tmp_path / name, ABOUT)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_refuses_what_it_cannot_record(tmp_path):
    model = resnet_cifar(8, 10)
    with pytest.raises(ValueError, match=r"'conv9'.*conv1, layer1\.0\.conv1"):
        GradientRecorder(model, ["conv1", "conv9"], 2)
    with pytest.raises(ValueError, match=r"'fc'.*none of the convolutions"):
        GradientRecorder(model, ["fc"], 2)
    with pytest.raises(ValueError, match="each once"):
        GradientRecorder(model, ["conv1", "conv1"], 2)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        GradientRecorder(model, ["conv1"], 0)
    recorder = GradientRecorder(model, ["conv1"], 2)
    with pytest.raises(ValueError, match="lacks seed, command"):
        recorder.save(tmp_path / "g.npz", {k: v for k, v in ABOUT.items() if k not in ("seed", "command")})
    assert not list(tmp_path.iterdir())


def test_damaged_recordings_are_named(tmp_path):
    model = resnet_cifar(8, 10)
    recorder = GradientRecorder(model, ["conv1"], 3)
    give_gradients(model, 0)
    recorder.add()
    path: Path = tmp_path / "g.npz"
    recorder.save(path, ABOUT)
    whole = path.read_bytes()
    for damaged in (b"", b"not an archive", whole[: len(whole) // 2], whole[:100] + b"\0" * 400 + whole[500:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"g\.npz"):
            gradients.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match=r"g\.npz is not a recording"):
        gradients.load(path)
    model.conv1.weight.grad[0] = np.inf
    recorder.add()
    recorder.save(path, ABOUT)
    with pytest.raises(ValueError, match="gradients of conv1 that are not finite"):
        gradients.load(path)


def test_rotation_finds_the_plane_that_the_gradients_lie_in():
    """Two hidden numbers make three gradients: the third axis has nothing but the noise."""
    generator = np.random.default_rng(1)
    hidden = generator.standard_normal((150, 2))
    plane = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 2.0]])
    values = np.zeros((150, 2304), np.float32)
    values[:, :3] = hidden @ plane + [5.0, 0.0, -3.0] + 0.01 * generator.standard_normal((150, 3))
    values[:, 3:] = generator.standard_normal((150, 2301))
    recording = Recording(ABOUT, {"conv": (3, 3, 16, 16)}, {"conv": values})
    numbers = gradients.adjacent(recording, "conv")
    assert sum(numbers["variance_shares"]) == pytest.approx(1)
    assert numbers["variance_shares"][2] < 1e-4
    assert numbers["loss_in_sample"] < 1e-4
    assert numbers["loss_held_out"] < 1e-4
    normal = np.cross(*plane)
    assert abs(np.dot(numbers["axes"][2], normal / np.linalg.norm(normal))) == pytest.approx(1, abs=1e-3)
    # the rest of the layer is independent, and the controls say so
    scaled = numbers["standardised"]
    assert scaled["these"] < 0.01
    assert scaled["adjacent"][1] == pytest.approx(scaled["independent"], abs=0.02)
    assert scaled["random"][1] == pytest.approx(scaled["independent"], abs=0.02)
    assert 0.25 < scaled["independent"] < 1 / 3


def test_losses_of_the_rotation_by_definition():
    values = np.random.default_rng(2).standard_normal((20, 16)).astype(np.float32) + 1
    recording = Recording(ABOUT, {"conv": (1, 1, 4, 4)}, {"conv": values})
    numbers = gradients.adjacent(recording, "conv", samples=12, first=4)
    g = values[:, 4:7].astype(np.float64)
    for fitted, tried, key in ((g, g, "loss_in_sample"), (g[:12], g[12:], "loss_held_out")):
        mean = fitted.mean(0)
        _, vectors = np.linalg.eigh(np.cov(fitted.T))
        u = vectors[:, 1:]
        decoded = (tried - mean) @ u @ u.T + mean
        assert numbers[key] == pytest.approx(np.sum((decoded - tried) ** 2) / np.sum(tried**2), rel=1e-6)


def structured(collocated: int, positions: int, count: int = 60, rank: int = 5) -> np.ndarray:
    """Every filter position's slice of F*D gradients lies in the same subspace, with other coefficients."""
    generator = np.random.default_rng(3)
    basis = generator.standard_normal((rank, collocated))
    slices = generator.standard_normal((count, positions, rank)) @ basis
    slices += 0.02 * generator.standard_normal(slices.shape)
    return slices.reshape(count, positions * collocated).astype(np.float32)


def recording_of(values: np.ndarray, shape: tuple[int, ...]) -> Recording:
    return Recording(ABOUT, {"conv": shape}, {"conv": values})


def test_dips_at_multiples_of_collocated_gradients():
    recording = recording_of(structured(64, 9), (3, 3, 8, 8))
    sweep = gradients.slice_sweep(recording, "conv", samples=40)
    rows = {row["slice_size"]: row for row in sweep["rows"]}
    assert sweep["collocated"] == 64
    assert {16, 20, 61, 63, 64, 65, 128, 192, 256, 288} <= rows.keys()
    assert max(rows) == 288
    assert rows[64]["n_components"] == 5
    for key in ("dips", "dips_later"):
        assert [m["slice_size"] for m in sweep[key]["multiples"]] == [64, 128, 192, 256]
        assert rows[64]["other_slices"] < 0.02
        assert sweep[key]["multiples"][0]["left"] < 0.05
    # what λ = 0.01 promises holds where the compressor was fitted, and not for slices that are cut elsewhere
    assert all(row["first_slice"] < 0.02 for row in sweep["rows"])
    assert rows[60]["other_slices"] > 0.5


def test_no_dips_without_structure():
    values = np.random.default_rng(4).standard_normal((60, 576)).astype(np.float32)
    sweep = gradients.slice_sweep(recording_of(values, (3, 3, 8, 8)), "conv", samples=40)
    assert 0.9 < sweep["dips"]["median_left"] < 1.1
    for row in sweep["rows"]:
        assert row["n_components"] <= 39
        assert row["other_slices"] == pytest.approx(row["random_basis"], abs=0.08)


@pytest.mark.parametrize("size", [16, 64, 100])
def test_losses_of_the_sweep_by_definition(size):
    """Eq. 3, 5 and 6 said again in NumPy, with a last slice that is not whole."""
    values = structured(64, 4, rank=12) + 0.3
    sweep = gradients.slice_sweep(recording_of(values, (2, 2, 8, 8)), "conv", sizes=[size], samples=40)
    (row,) = sweep["rows"]
    g = values.astype(np.float64)
    mean = g[:40].mean(axis=0)
    first = g[:40, :size] - mean[:size]
    spectrum, vectors = np.linalg.eigh(first.T @ first)
    share = np.cumsum(spectrum[::-1]) / spectrum.sum()
    d = int(np.argmax(share >= 0.99)) + 1
    u = vectors[:, ::-1][:, :d]
    decoded = np.empty_like(g)
    for start in range(0, 256, size):
        stop = min(start + size, 256)
        part = np.zeros((60, size))
        part[:, : stop - start] = g[:, start:stop] - mean[start:stop]
        decoded[:, start:stop] = (part @ u @ u.T)[:, : stop - start] + mean[start:stop]

    def loss(rows: slice, columns: slice) -> float:
        wrong, right = (decoded - g)[rows, columns], g[rows, columns]
        return float(np.mean(np.sum(wrong**2, axis=1) / np.sum(right**2, axis=1)))

    assert row["n_components"] == d
    assert row["ratio"] == size / d
    now, later, inside, others = slice(0, 40), slice(40, 60), slice(0, size), slice(size, 256)
    assert row["first_slice"] == pytest.approx(loss(now, inside), rel=1e-3, abs=1e-6)
    assert row["first_slice_later"] == pytest.approx(loss(later, inside), rel=1e-3, abs=1e-6)
    assert row["other_slices"] == pytest.approx(loss(now, others), rel=1e-3, abs=1e-6)
    assert row["other_slices_later"] == pytest.approx(loss(later, others), rel=1e-3, abs=1e-6)


def test_sweep_refuses_sizes_and_recordings_that_do_not_fit():
    recording = recording_of(structured(16, 4), (2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"slice sizes must be 1 to 32 \(half of conv\), got \[40\]"):
        gradients.slice_sweep(recording, "conv", sizes=[40])
    with pytest.raises(ValueError, match="at least 3 iterations, conv has 2"):
        gradients.slice_sweep(recording_of(structured(16, 4, count=2), (2, 2, 4, 4)), "conv")
