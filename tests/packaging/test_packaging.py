"""What `pip install` gives: the wheel, in an environment that has what it requires and nothing else."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from bench.common.optional_packages import EXTRAS, what_is_missing
from tests.support.installed import FRESH, Installed
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: A package as it is imported, where its distribution has another name.
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}

LOOK = """
    import importlib, json, pkgutil, sys
    import bench, gradiveq, ring
    from bench.common.optional_packages import what_is_missing
    out = {"where": [package.__file__ for package in (bench, gradiveq, ring)], "imported": [], "missing": {}}
    for package in (ring, gradiveq, bench):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                out["missing"][module.name] = what_is_missing(error) or f"{type(error).__name__}: {error}"
            else:
                out["imported"].append(module.name)
    from bench import clusters
    from bench.data import load
    from bench.common.optional_packages import EXTRAS
    out["extras"] = sorted(EXTRAS.keys() & sys.modules.keys())
    out["images"] = len(load().train_images)
    out["nodes"] = clusters.load("gradiveq-cpu").nodes
    print(json.dumps(out))
"""


def python(installed: Installed, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **FRESH}
    return subprocess.run(
        [str(installed.python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_what_is_in_the_wheel(installed: Installed) -> None:
    files = set(zipfile.ZipFile(installed.wheel).namelist())
    tracked = [path for name in ("ring", "gradiveq", "bench") for path in (ROOT / name).rglob("*")]
    code = {str(path.relative_to(ROOT)) for path in tracked if path.suffix in (".py", ".toml", ".typed", ".gz")}
    assert code <= files, code - files
    licences = {name for name in files if re.search(r"dist-info/licenses/(bench/sample/)?LICENSE$", name)}
    assert len(licences) == 2, files
    assert {"bench/sample/LICENSE", "ring/py.typed", "gradiveq/py.typed", "bench/py.typed"} <= files
    assert not [name for name in files if name.startswith(("tests", "results"))]
    with tarfile.open(installed.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert code | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_every_command_is_there(installed: Installed) -> None:
    for name, target in PROJECT["scripts"].items():
        assert installed.python.with_name(name).is_file()
        module, _, function = target.partition(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_all_can_be_imported_that_needs_no_extra(installed: Installed, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-c", "\n".join(line[4:] for line in LOOK.splitlines()))
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    environment = str(installed.python.parent.parent)
    assert all(file.startswith(environment) for file in out["where"])
    assert not out["extras"]
    mpi = {f"ring.{name}" for name in ("abort", "bench", "calibrate", "mpi", "probe", "world")}
    triton = {
        "gradiveq.over_ring.staged_qsgd",
        "gradiveq.over_ring.qsgd_triton",
    }  # which torch's builds for GPUs bring along
    assert {name for name in out["missing"] if not name.startswith("bench.")} - triton == mpi
    for name, said in out["missing"].items():
        expected = "triton" if name in triton else r"pip install 'gradiveq\[\w+\]'"
        assert re.search(expected, said), (name, said)
    # What trains, predicts and advises.
    job = {f"bench.{name}" for name in ("resnet32_cifar100", "job.command", "job.train", "job.configure", "job.report")}
    predictions = {"bench.virtual.method_times", "bench.virtual.rates"}
    assert job | predictions <= set(out["imported"])
    assert (out["images"], out["nodes"]) == (6000, 6)


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("ring-bench", "mpich"),
        ("gradiveq-train", "mpich"),
        ("gradiveq-advise", "figures"),
        ("gradiveq-scaling", "figures"),
    ],
)
def test_a_missing_extra_is_one_line(installed: Installed, tmp_path: Path, command: str, extra: str) -> None:
    done = python(installed, tmp_path, str(installed.python.with_name(command)))
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"error: .*pip install 'gradiveq\[{extra}\]'.*\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_extras_that_errors_name_have_the_package() -> None:
    for package, extra in EXTRAS.items():
        listed = PROJECT["optional-dependencies"][extra]
        assert any(re.match(rf"{NAMES.get(package, package)}\b", line) for line in listed), (package, extra)


def test_other_errors_are_left_alone() -> None:
    assert what_is_missing(ModuleNotFoundError("No module named 'nosuch'", name="nosuch")) is None
    assert what_is_missing(ImportError("cannot import name", name="matplotlib")) is None
    assert what_is_missing(RuntimeError("something else")) is None
    said = what_is_missing(RuntimeError("cannot load MPI library\nlibmpi.so.12: cannot open shared object file"))
    assert said is not None
    assert "\n" not in said
