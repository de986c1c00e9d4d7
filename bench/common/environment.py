"""Where a result comes from: versions, processor, commit, and the digest of the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Dataset
from ring.machine import processor

#: What git is asked about: recording results again doesn't change what makes them.
SOURCE = (":(top)", ":(top,exclude)results")


def dataset_digest(dataset: Dataset) -> str:
    """SHA-256 of all images and labels."""
    digest = hashlib.sha256()
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def environment(packages: tuple[str, ...] = ("numpy", "scipy", "torch", "numba", "mpi4py")) -> dict[str, Any]:
    """What this machine and installation are; the caller adds MPI, the command and the data."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": processor(),
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this source, with "+changes" if files but results differ from it; None where git can't say."""
    try:
        texts = [
            subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *SOURCE])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return texts[0] + ("+changes" if texts[1] else "")
