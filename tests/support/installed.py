"""The wheel, built from the checkout's files and installed in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.processes import ROOT

#: In a fresh environment the first import compiles all kernels, for 11 s; nothing that is tried there calls them.
FRESH = {"NUMBA_DISABLE_JIT": "1"}


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, what the wheel requires, and nothing else: no extra, no checkout.

    Attributes:
        sdist, wheel: what was built, the wheel from the sdist.
        python: the environment's, beside the commands that the wheel brings, and `torchrun`.
    """

    sdist: Path
    wheel: Path
    python: Path


def required(by: Distribution) -> set[str]:
    """The names of what a distribution requires without extras, and of what those do."""
    found, left = set[str](), [by]
    while left:
        for one in map(Requirement, left.pop().requires or ()):
            name = one.name.lower().replace("_", "-")
            if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
                found.add(name)
                left.append(distribution(name))
    return found


def install(folder: Path) -> Installed:
    """Build in a folder, without network: what the wheel requires is lent by this environment."""

    def call(*command: str | Path) -> None:
        done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # and not what building has left in the checkout
        shutil.copy(ROOT / name, source)
    for name in ("ring", "gradiveq", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")

    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (metadata,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    for name in required(PathDistribution(metadata)):
        lent = distribution(name)
        tops = {file.parts[0] for file in lent.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not top.endswith(".pth"):
                (packages / top).symlink_to(Path(str(lent.locate_file(top))))
    # Finds everything there, in the versions that the wheel asks for, or fails.
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-compile", wheel)
    torchrun = python.with_name("torchrun")
    torchrun.write_text(f"#!{python}\nimport sys\nfrom torch.distributed.run import main\nsys.exit(main())\n")
    torchrun.chmod(0o755)
    return Installed(sdist, wheel, python)
