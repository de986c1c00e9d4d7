"""The described clusters that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import clusters
from ring import cluster as files
from ring.cluster import ClusterError

NODES = {"gradiveq-cpu": 6, "gradiveq-k80": 6, "v100-10gbe": 2, "v100-10gbe-4": 4, "v100-8gpu": 8}
#: What dry runs of the three methods need.
RATES = {"add", "copy", "scale", "qsgd.encode", "qsgd.recode", "qsgd.decode", "pca.encode", "pca.decode"}


def test_all_presets_are_known() -> None:
    assert clusters.names() == sorted(NODES)


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_preset_says_where_it_is_from_and_has_all_that_a_dry_run_needs(name: str, tmp_path: Path) -> None:
    cluster = clusters.load(name)
    assert (cluster.name, cluster.nodes) == (name, NODES[name])
    assert "et al." in cluster.source
    assert cluster.homogeneous
    assert cluster.node.iteration_s is not None
    assert set(cluster.rates) == RATES
    files.write(cluster, tmp_path / "copy.toml")
    assert clusters.load(str(tmp_path / "copy.toml")) == cluster


@pytest.mark.parametrize("name", sorted(NODES))
def test_every_number_of_a_preset_has_a_comment(name: str) -> None:
    """On its line, or on the lines above it or its neighbours: a blank line or a table's head ends what was said."""
    said = False
    for number, line in enumerate((clusters.FOLDER / f"{name}.toml").read_text().splitlines(), 1):
        if line.startswith("["):
            said = False
        elif "#" in line:
            said = True
        elif "=" in line and not line.startswith(("name", "source")):
            assert said, f"line {number}: {line}"


def test_other_clusters_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r"^there is no cluster 'gradiveq-gpu': give gradiveq-cpu, .*TOML file$"):
        clusters.load("gradiveq-gpu")
    (tmp_path / "mine.toml").write_text("nodes = 6\n[link]\nbandwidth_gbps = -1\n")
    with pytest.raises(ClusterError, match=r"mine.toml: `link.bandwidth_gbps` must be above 0, got -1$"):
        clusters.load(str(tmp_path / "mine.toml"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterError, match=r"results/this-machine.toml.*bench.calibrate"):
        clusters.load("this-machine")


def test_this_machine_is_what_calibration_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    files.write(clusters.load("v100-8gpu").with_nodes(3, name="here"), clusters.THIS_MACHINE)
    assert clusters.load("this-machine").nodes == 3
