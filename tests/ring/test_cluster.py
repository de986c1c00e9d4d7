"""Cluster files: what they may say, and how they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring.cluster import Cluster, ClusterError, Link, Node, Racks, Stragglers, as_table, parse, read, write

EVERYTHING = """
name = "two-racks"
source = "invented for this test"
nodes = 6
seed = 7
shared_cores = 2
[node]
compute_speed = 2.0
iteration_s = 1.3
slowdown = 1.5
call_us = 9.0
overhead_us = 3.0
copy_us_per_mib = 40.0
overlap_slowdown = 1.2
[link]
latency_us = 50.0
jitter_us = 5.0
bandwidth_gbps = 10.0
packet_loss = 0.01
burst_bytes = 1000
full_duplex = false
[racks]
size = 3
uplink_gbps = 5.0
placement = "round-robin"
[stragglers]
probability = 0.1
slowdown = 4.0
[rates]
add = 4e9
"qsgd.encode" = 3e8
[override.node.3]
compute_speed = 0.5
[override.link.2]
bandwidth_gbps = 1.0
"""


def test_everything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(EVERYTHING)
    cluster = read(path)
    node = Node(2.0, 1.3, 1.5, 9.0, 3.0, 40.0, 1.2)
    link = Link(50.0, 5.0, 10.0, 0.01, 1000, False)
    assert cluster == Cluster(
        "two-racks",
        "invented for this test",
        6,
        7,
        2,
        node,
        link,
        Racks(3, 5.0, "round-robin"),
        Stragglers(0.1, 4.0),
        {"add": 4e9, "qsgd.encode": 3e8},
        {3: replace(node, compute_speed=0.5)},
        {2: replace(link, bandwidth_gbps=1.0)},
    )
    assert cluster.node_at(3).compute_speed == 0.5
    assert cluster.node_at(2) is cluster.node
    assert cluster.link_from(2).bytes_per_s == pytest.approx(1e9 / 8 * 0.99)
    assert not cluster.homogeneous


def test_a_written_file_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for text in (EVERYTHING, "nodes = 2"):
        path.write_text(text)
        cluster = read(path)
        write(cluster, path)
        assert read(path) == cluster
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.toml"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("nodes = 2")
    with pytest.raises(TypeError):
        write(replace(Cluster(nodes=2), source=object()), path)  # type: ignore[arg-type]
    assert path.read_text() == "nodes = 2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.toml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "`nodes`, the number of workers, is missing"),
        ("nodes = 0", "`nodes` must be at least 1, got 0"),
        ("nodes = 2.5", "`nodes` must be a whole number, got 2.5"),
        ("nodes = true", "`nodes` must be a finite number, got True"),
        ("nodes = 2\nlatency = 1", r"unknown key `latency` \(= 1\); known are name, source"),
        ("nodes = 2\n[link]\nbandwidth = 1", r"unknown key `link.bandwidth` \(= 1\); known are latency_us"),
        ("nodes = 2\n[link]\nbandwidth_gbps = -3", "`link.bandwidth_gbps` must be above 0, got -3"),
        ("nodes = 2\n[link]\nbandwidth_gbps = nan", "`link.bandwidth_gbps` must be a finite number, got nan"),
        ("nodes = 2\n[link]\npacket_loss = 1", "`link.packet_loss` must be below 1, got 1"),
        ("nodes = 2\n[link]\nfull_duplex = 1", "`link.full_duplex` must be true or false, got 1"),
        ("nodes = 2\n[node]\noverlap_slowdown = 0.5", "`node.overlap_slowdown` must be at least 1, got 0.5"),
        ("nodes = 2\nnode = 3", "`node` must be a table, got 3"),
        ("nodes = 2\nname = 3", "`name` must be text, got 3"),
        ("nodes = 2\n[racks]\nplacement = 'x'", "`racks.placement` must be 'block' or 'round-robin', got 'x'"),
        ("nodes = 2\n[stragglers]\nprobability = 1.5", "`stragglers.probability` must be at most 1, got 1.5"),
        ("nodes = 2\n[rates]\nadd = 0", "`rates.add` must be above 0, got 0"),
        ("nodes = 2\n[override.node.2]\nslowdown = 2", r"`override.node.2`: nodes are numbered 0 to 1 \(`nodes` - 1\)"),
        ("nodes = 2\n[override.rack.1]\nslowdown = 2", "unknown key `override.rack`"),
        ("nodes = 2\n[override.link.1]\nlatency_us = -1", "`override.link.1.latency_us` must be at least 0, got -1"),
        (
            "nodes = 2\n[override.link.1]\nfull_duplex = false",
            "`override.link.1.full_duplex`: ports are alike on all nodes",
        ),
        ("nodes = 4\n[override.node.03]\nslowdown = 2", r"`override.node.03`: nodes are numbered 0 to 3"),
        (f"nodes = {'9' * 400}", "`nodes` must be a finite number"),
        ("nodes = [", "not a TOML file"),
    ],
)
def test_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"none\.toml: can't be read \(No such file"):
        read(tmp_path / "none.toml")


def test_with_nodes() -> None:
    cluster = parse({"nodes": 3, "link": {"latency_us": 5}, "override": {"node": {"2": {"slowdown": 2}}}}, "x")
    other = cluster.with_nodes(100, link={"bandwidth_gbps": 1}, name="other")
    assert (other.nodes, other.name, other.link.latency_us, other.link.bandwidth_gbps) == (100, "other", 5, 1)
    assert not other.other_nodes


def test_racks() -> None:
    assert [Racks(2, 1.0, "block").of(node, 5) for node in range(5)] == [0, 0, 1, 1, 2]
    assert [Racks(2, 1.0, "round-robin").of(node, 5) for node in range(5)] == [0, 1, 2, 0, 1]


@given(st.floats(1e-3, 1e3), st.floats(0, 0.9), st.integers(1, 5), st.booleans())
def test_tables_round_trip(bandwidth: float, loss: float, nodes: int, duplex: bool) -> None:
    link = Link(1.0, 0.0, bandwidth, loss, 0, duplex)
    cluster = Cluster(nodes=nodes, link=link, other_links={nodes - 1: replace(link, latency_us=2.0)})
    assert parse(as_table(cluster), "x") == cluster
