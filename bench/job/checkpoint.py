"""Checkpoints of a run that many ranks write: one counts only once every rank's part is on disk.

    checkpoint/
        manifest.json                        which parts belong together, and what is finished
        <method>-<iteration>-rank<r>.pt      a rank's part

    1. Each rank writes its part under a temporary name, brings it to the disk and renames it.
    2. The ranks tell each other the size and the digest of what they wrote. Nobody goes on before all have.
    3. Rank 0 replaces the manifest, which is one rename.
    4. Only then each rank removes the parts that the manifest no longer names.

So at any moment the manifest names parts that are all there, whoever is killed when: either the old ones or the new
ones. Parts are read back without unpickling code (`weights_only`). All ranks have to see the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench.common.files import file_name, read_json, write_atomically, write_json
from ring.handle import Ring

FOLDER = "checkpoint"
MANIFEST = "manifest.json"
UNKNOWN_ERROR = -1
VERSION = 2


class CheckpointError(RuntimeError):
    """A checkpoint can't be written or read; raised on all ranks where it was found while writing."""


class Checkpoints:
    """The checkpoints of one run, as one rank sees them. `save` and `finish` are collective.

    Args:
        run_folder: the folder of the run; its `checkpoint` folder is made when it is needed.
        ring: all ranks of the run.

    Attributes:
        finished: method -> what rank 0 passed to `finish`, in the order of the methods.
        current: the manifest's entry of the method that was interrupted, or None: "method", "iteration", and what
            rank 0 passed to `save` as `extra`.
    """

    def __init__(self, run_folder: Path, ring: Ring) -> None:
        self.folder = run_folder / FOLDER
        self.ring = ring
        manifest = read_manifest(run_folder, ring.size)
        self.finished: dict[str, Any] = manifest["finished"]
        self.current: dict[str, Any] | None = manifest["current"]

    def save(self, method: str, iteration: int, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Make this the checkpoint to resume from.

        Args:
            method: which runs.
            iteration: how many iterations are done.
            state: this rank's: tensors, NumPy arrays, numbers, text, and dicts, lists and tuples of these.
            extra: for the manifest; rank 0's counts.
        Raises:
            CheckpointError: on all ranks, if one of them could not write.
        """
        if self.current and (self.current["method"], self.current["iteration"]) == (method, iteration):
            return  # writing the same parts again would leave a moment in which they don't match the manifest
        name = f"{file_name(method)}-{iteration}-rank{{}}.pt"
        num_bytes, digest, failure = self._write_part(self.folder / name.format(self.ring.rank), state)
        said = self.ring.rows_of_all([failure, num_bytes, *digest])
        self._check(said[:, 0], "its part of the checkpoint")
        self.current = {
            "method": method,
            "iteration": iteration,
            **extra,
            "parts": [
                {
                    "file": name.format(rank),
                    "bytes": int(said[rank, 1]),
                    "sha256": bytes(said[rank, 2:].astype(np.uint8)).hex(),
                }
                for rank in range(self.ring.size)
            ],
        }
        self._publish()

    def finish(self, method: str, result: Mapping[str, Any]) -> None:
        """Record that a method is done; there is nothing of it to resume from then.

        Raises:
            CheckpointError: on all ranks, if rank 0 could not write.
        """
        self.finished[method] = dict(result)
        self.current = None
        self._publish()

    def load(self) -> Any:
        """This rank's part of the checkpoint that `current` describes.

        Raises:
            CheckpointError: if it is missing or damaged; not collective.
        """
        assert self.current is not None
        part = self.current["parts"][self.ring.rank]
        path = self.folder / part["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != part["sha256"]:
            raise CheckpointError(
                f"{path}: damaged, {len(data):,} bytes with SHA-256 {digest[:12]}…, "
                f"expected {part['bytes']:,} with {part['sha256'][:12]}…"
            )
        try:
            return restored(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from error

    def _write_part(self, path: Path, state: Mapping[str, Any]) -> tuple[int, bytes, int]:
        """Bytes and digest of what was written, and 0, or the number of the error if it could not be."""
        data = io.BytesIO()
        torch.save(storable(state), data)
        content = data.getvalue()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            return 0, bytes(32), error.errno or UNKNOWN_ERROR
        return len(content), hashlib.sha256(content).digest(), 0

    def _publish(self) -> None:
        failure = 0
        if self.ring.rank == 0:
            manifest = {
                "version": VERSION,
                "ranks": self.ring.size,
                "finished": self.finished,
                "current": self.current,
            }
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / MANIFEST, manifest)
            except OSError as error:
                failure = error.errno or UNKNOWN_ERROR
        self._check(self.ring.rows_of_all([failure])[:, 0], "the manifest of the checkpoint")
        keep = {part["file"] for part in self.current["parts"]} if self.current else set()
        for path in self.folder.glob(f"*-rank{self.ring.rank}.pt*"):
            if path.name not in keep:
                with contextlib.suppress(OSError):  # it does no harm
                    path.unlink(missing_ok=True)

    def _check(self, failures: npt.NDArray[np.float64], what: str) -> None:
        """Raises CheckpointError if any rank has the number of an error."""
        for rank, number in enumerate(failures):
            if number:
                reason = f" ({os.strerror(int(number))})" if number != UNKNOWN_ERROR else ""
                raise CheckpointError(f"rank {rank} could not write {what} in {self.folder}{reason}")


def read_manifest(run_folder: Path, size: int) -> dict[str, Any]:
    """The manifest, or an empty one where no checkpoint was written.

    Raises:
        CheckpointError: if there is one that can't be read, or is not of `size` ranks.
    """
    path = run_folder / FOLDER / MANIFEST
    if not path.exists():
        return {"version": VERSION, "ranks": size, "finished": {}, "current": None}
    try:
        manifest: dict[str, Any] = read_json(path)
        version, ranks = manifest["version"], manifest["ranks"]
        if version != VERSION:
            raise CheckpointError(f"{path}: version {version}, expected {VERSION}")
        if ranks != size:
            raise CheckpointError(f"{path}: written by {ranks} ranks, now there are {size}")
        manifest["finished"].keys()
        current = manifest["current"]
        if current is not None:
            current["method"], current["iteration"]
            for rank in range(size):
                part = current["parts"][rank]
                part["file"], part["bytes"], part["sha256"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error!r})") from error
    return manifest


def storable(value: Any) -> Any:
    """NumPy's arrays and scalars as tensors and numbers, which `torch.load` reads without running pickled code."""
    if isinstance(value, np.ndarray):
        return {"__ndarray__": torch.from_numpy(np.array(value, order="C"))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: storable(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(storable(item) for item in value)
    if isinstance(value, list):
        return [storable(item) for item in value]
    return value


def restored(value: Any) -> Any:
    if isinstance(value, dict):
        if "__ndarray__" in value:
            return value["__ndarray__"].numpy()
        return {key: restored(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(restored(item) for item in value)
    if isinstance(value, list):
        return [restored(item) for item in value]
    return value
