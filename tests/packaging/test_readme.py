"""What the README and the page of methods show works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from gradiveq.compressors import COMPRESSORS, Compressor, Draw
from gradiveq.exchange.compressed import Compression
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Part
from gradiveq.flatten import Bucket
from gradiveq.here import Here
from gradiveq.specs import parse
from tests.support.installed import FRESH, Installed
from tests.support.printed import METHODS, README, ROOT, block, losses, section

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def added() -> Compressor:
    """The compressor of "Adding a method"."""
    module = ModuleType("largest_sign")
    listing = block(section(METHODS, "## Adding a method"), "python")
    exec(compile(listing, "METHODS.md", "exec"), module.__dict__)
    compressor: Compressor = module.__dict__["LargestSign"]()
    return compressor


@pytest.mark.parametrize("length", [0, 1, 2, 47, 700])
def test_the_added_method(added: Compressor, length: int) -> None:
    values = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    draw = Draw(0, 0, 0, 0)
    payload = added.compress(values, draw)
    assert payload.dtype == np.uint8
    assert len(payload) == added.payload_bytes(length)
    out = np.full(length, np.nan, np.float32)
    added.decompress(payload, out, draw)
    expected = np.sign(values) * (np.abs(values).max() if length else 0)
    np.testing.assert_array_equal(out, expected.astype(np.float32))
    omega = added.constants(length).omega
    assert omega is not None
    assert float(out @ out) <= (1 + omega) * float(values @ values) * (1 + 1e-6)


@pytest.mark.parametrize("length", [0, 1, 2, 47, 700])
def test_the_added_methods_torch_form(added: Compressor, length: int) -> None:
    values = np.random.default_rng(2).standard_normal(length).astype(np.float32)
    values[: length // 3] = 0
    draw = Draw(0, 0, 0, 0)
    assert added.on_device
    payload = added.compress(values, draw)
    tensor = added.compress_tensor(torch.from_numpy(values), draw)
    np.testing.assert_array_equal(tensor.numpy(), payload)
    out = np.empty(length, np.float32)
    added.decompress(payload, out, draw)
    several = added.estimates(torch.stack([tensor, tensor]), length)
    np.testing.assert_array_equal(several.numpy().view(np.uint32), np.stack([out, out]).view(np.uint32))


def test_the_added_method_among_workers(added: Compressor) -> None:
    parts = [Part("a", 0, 10, added), Part("b", 10, 33, added)]
    here = Here(lambda rank: Compression(lambda call: parts, feedback=ErrorFeedback()), Bucket((), 33), 2)
    gradients = list(np.random.default_rng(1).standard_normal((2, 33)).astype(np.float32))
    mean = np.empty(33, np.float32)
    here.aggregate(gradients, mean, 0)
    estimates = [
        np.concatenate([np.sign(part) * np.abs(part).max() for part in (gradient[:10], gradient[10:])])
        for gradient in gradients
    ]
    np.testing.assert_allclose(mean, np.mean(estimates, 0), rtol=1e-6)


def test_the_table_of_methods_has_every_compressor() -> None:
    table = METHODS.split("## What a text says")[0]
    named = set(re.findall(r"(?m)^\| `([\w-]+)`", table))
    assert COMPRESSORS.keys() - {"identity"} <= named
    assert {"powersgd", "accordion"} <= named


@pytest.mark.parametrize("spec", re.search(r"--methods (\S+half)", METHODS)[1].split(","))  # type: ignore[index]
def test_the_specs_of_the_example(spec: str) -> None:
    parse(spec)


def run(heading: str, name: str, command: str, folder: Path, python: Path) -> str:
    """Save the script that a section prints, run the command that it prints, and return what that printed.

    Args:
        python: the environment's, beside the commands.
    """
    printed = section(README, heading)
    assert f"    {command}\n" in printed
    script = block(printed, "python")
    assert len(script.splitlines()) <= 40
    assert max(map(len, script.splitlines())) <= 120
    (folder / name).write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    if python == Path(sys.executable):
        environment["PYTHONPATH"] = str(ROOT)
    else:
        environment |= FRESH
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_script_for_torchrun_trains(tmp_path: Path, installed: Installed) -> None:
    """Where the wheel and what it requires is all there is: nobody needs MPI for it."""
    command = "torchrun --nproc-per-node 2 train_ddp.py"
    printed = run("## In PyTorch", "train_ddp.py", command, tmp_path, installed.python)
    first, *_, last = losses(printed)
    assert last < first / 3, printed
    *_, end = printed.splitlines()
    assert "compress" in end
    assert float(end.split("/ ")[1]) > 2, printed


def test_the_script_for_mpi_trains(tmp_path: Path) -> None:
    command = "mpirun -n 2 python train_mpi.py"
    printed = run("## Over MPI", "train_mpi.py", command, tmp_path, Path(sys.executable))
    first, *_, last = losses(printed)
    assert last < first / 3, printed
    *_, end = printed.splitlines()
    assert "compress" in end
    assert float(end.split("/ ")[1]) > 4, printed
