"""The command that records gradients, under mpirun."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.papers.gradiveq.recorded_gradients import load
from tests.support.processes import Launch

COMMAND = ["-m", "bench.record_gradients", "--batch-size", "2", "--skip", "1", "--count", "2"]


def test_records_the_mean_gradients_of_the_layers(mpirun: Launch, tmp_path: Path) -> None:
    done = mpirun(2, [*COMMAND, "--layers", "conv1,layer1.0.conv1", "--out", "recorded"], PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    recording = load(tmp_path / "recorded" / "gradients.npz")
    assert recording.about["ranks"] == 2
    assert recording.about["first_iteration"] == 1
    assert "Fashion-MNIST sample" in recording.about["data"]
    assert {name: values.shape for name, values in recording.gradients.items()} == {
        "conv1": (2, 432),
        "layer1.0.conv1": (2, 2304),
    }
    assert all(np.isfinite(values).all() and values.any() for values in recording.gradients.values())


def test_an_unknown_layer_is_one_line_from_rank_0(mpirun: Launch, tmp_path: Path) -> None:
    done = mpirun(2, [*COMMAND, "--layers", "conv9", "--out", "recorded"], PYTHONWARNINGS="default")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "conv9" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "recorded").exists()
