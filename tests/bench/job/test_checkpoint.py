"""A checkpoint counts once every rank's part is on disk, whoever is stopped where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.job.checkpoint
from bench.common.files import write_atomically
from bench.job.checkpoint import VERSION, CheckpointError, Checkpoints, read_manifest
from bench.job.record import Metrics
from ring.handle import Ring
from ring.lockstep import run

SIZE = 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process runs after it."""


def state(rank: int, iteration: int) -> dict[str, Any]:
    return {"weights": torch.full((5,), float(iteration)), "rank": rank, "samples": np.arange(4.0) * rank}


def save(folder: Path, iteration: int, method: str = "rar") -> None:
    def work(ring: Ring) -> None:
        Checkpoints(folder, ring).save(
            method, iteration, state(ring.rank, iteration), {"metrics_bytes": 10 * iteration}
        )

    run(SIZE, work)


def check(folder: Path, iteration: int) -> None:
    def work(ring: Ring) -> None:
        checkpoints = Checkpoints(folder, ring)
        assert checkpoints.current is not None
        assert checkpoints.current["iteration"] == iteration
        assert checkpoints.current["metrics_bytes"] == 10 * iteration
        loaded = checkpoints.load()
        expected = state(ring.rank, iteration)
        assert loaded.keys() == expected.keys()
        assert torch.equal(loaded["weights"], expected["weights"])
        assert loaded["rank"] == ring.rank
        assert loaded["samples"].dtype == np.float64
        assert np.array_equal(loaded["samples"], expected["samples"])

    run(SIZE, work)


def test_the_last_one_is_found_and_the_one_before_removed(tmp_path: Path) -> None:
    for iteration in (5, 10):
        save(tmp_path, iteration)
        check(tmp_path, iteration)
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"manifest.json", *(f"rar-10-rank{rank}.pt" for rank in range(SIZE))}


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    manifest = read_manifest(tmp_path, SIZE)
    assert manifest["current"] is None
    assert manifest["finished"] == {}
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("writes", range(SIZE + 1))
def test_killed_after_any_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The second checkpoint is cut short after `writes` of its files are written (the fourth would be the manifest)."""
    save(tmp_path, 5)
    written: list[Path] = []

    def write(path: Path, data: bytes) -> None:
        if len(written) >= writes:
            path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])
            raise Killed
        written.append(path)
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(bench.job.checkpoint, "write_atomically", write)
        patch.setattr(bench.job.checkpoint, "write_json", lambda path, value: write(path, json.dumps(value).encode()))
        with pytest.raises(Killed):
            save(tmp_path, 10)
    check(tmp_path, 5)
    # Going on from there reaches the same iteration again, and cleans up.
    save(tmp_path, 10)
    check(tmp_path, 10)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1 + SIZE


def test_killed_before_the_old_parts_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            save(tmp_path, 10)
    check(tmp_path, 10)


def test_a_rank_that_cannot_write_is_named_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    def write(path: Path, data: bytes) -> None:
        if "rank1" in path.name:
            raise OSError(28, "No space left on device")
        write_atomically(path, data)

    def work(ring: Ring) -> str:
        with pytest.raises(CheckpointError) as caught:
            Checkpoints(tmp_path, ring).save("rar", 10, state(ring.rank, 10), {})
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setattr(bench.job.checkpoint, "write_atomically", write)
        messages = run(SIZE, work)
    assert len(set(messages)) == 1
    assert "rank 1 could not write its part" in messages[0]
    assert messages[0].endswith("(No space left on device)")
    check(tmp_path, 5)


def test_a_manifest_that_cannot_be_written_is_told_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def write(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    def work(ring: Ring) -> None:
        with pytest.raises(
            CheckpointError, match=r"^rank 0 could not write the manifest .* \(No space left on device\)"
        ):
            Checkpoints(tmp_path, ring).save("rar", 10, state(ring.rank, 10), {})

    with monkeypatch.context() as patch:
        patch.setattr(bench.job.checkpoint, "write_json", write)
        run(SIZE, work)
    check(tmp_path, 5)


def test_saving_the_same_iteration_again_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    save(tmp_path, 5)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == before


def test_a_finished_method_has_no_parts(tmp_path: Path) -> None:
    save(tmp_path, 5)
    run(SIZE, lambda ring: Checkpoints(tmp_path, ring).finish("rar", {"test_accuracy": 0.5}))
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["manifest.json"]
    save(tmp_path, 7, "qsgd")
    manifest = read_manifest(tmp_path, SIZE)
    assert manifest["finished"] == {"rar": {"test_accuracy": 0.5}}
    assert manifest["current"]["method"] == "qsgd"


def test_damage_is_found(tmp_path: Path) -> None:
    save(tmp_path, 5)
    part = tmp_path / "checkpoint" / "rar-5-rank0.pt"
    content = part.read_bytes()
    ring = run(SIZE, lambda ring: ring)[0]
    for bad in (content[:-1], content[:100] + b"?" + content[101:], b""):
        part.write_bytes(bad)
        with pytest.raises(CheckpointError, match=rf"rar-5-rank0\.pt: damaged, {len(bad):,} bytes"):
            Checkpoints(tmp_path, ring).load()
    part.unlink()
    with pytest.raises(CheckpointError, match=r"rar-5-rank0\.pt: No such file"):
        Checkpoints(tmp_path, ring).load()

    with pytest.raises(CheckpointError, match="written by 3 ranks, now there are 2"):
        read_manifest(tmp_path, 2)
    manifest = tmp_path / "checkpoint" / "manifest.json"
    empty = {"version": VERSION, "ranks": SIZE, "finished": {}}
    whole = {"method": "rar", "iteration": 1, "parts": []}
    damaged = [{"version": 0}, {"version": VERSION, "ranks": SIZE}, empty, {**empty, "current": whole}]
    for bad_text in ("", "[]", "{", *map(json.dumps, damaged)):
        manifest.write_text(bad_text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(tmp_path, SIZE)


def test_parts_run_no_code(tmp_path: Path) -> None:
    """A part with something else than data in it is refused, even if its digest is right."""
    ring = run(1, lambda ring: ring)[0]
    checkpoints = Checkpoints(tmp_path, ring)
    checkpoints.save("rar", 1, {"path": tmp_path}, {})  # a Path is pickled as a call
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        checkpoints.load()


def test_state_survives(tmp_path: Path) -> None:
    value = {
        "numbers": [1, 2.5, None, True, float("inf")],
        "tuple": (np.float32(1.5), np.int64(7)),
        "arrays": {kind: np.arange(3).astype(kind) for kind in ("float32", "float64", "int64", "uint8", "bool")},
        "empty": np.empty((0, 4), np.float32),
        7: {"nested": [torch.ones(2, dtype=torch.float64)]},
    }
    ring = run(1, lambda ring: ring)[0]
    checkpoints = Checkpoints(tmp_path, ring)
    checkpoints.save("rar", 1, value, {})
    loaded = checkpoints.load()
    assert loaded["numbers"] == value["numbers"]
    assert loaded["tuple"] == (1.5, 7)
    for kind, array in value["arrays"].items():  # type: ignore[union-attr]
        assert loaded["arrays"][kind].dtype == array.dtype
        assert np.array_equal(loaded["arrays"][kind], array)
    assert loaded["empty"].shape == (0, 4)
    assert loaded[7]["nested"][0].dtype == torch.float64


def test_metrics_are_cut_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write({"iteration": 0, "loss": float("nan")})
    position = metrics.sync()
    metrics.write({"iteration": 1})
    metrics.close()
    with path.open("a") as file:
        file.write('{"iteration": 2, "lo')  # a line that was cut short
    metrics = Metrics(path, position)
    metrics.write({"iteration": 1, "again": True})
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 0, "loss": None}, {"iteration": 1, "again": True}]
    with pytest.raises(ValueError, match="checkpoint was written after 9,999"):
        Metrics(path, 9_999)
