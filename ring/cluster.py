"""Described clusters: TOML files that tell the emulator (`ring.emulator`) of machines that nobody has at hand.

    name = "two-racks"                # for tables and figures
    source = "where the numbers come from"
    nodes = 6                         # workers; the ring goes around them in their order
    seed = 0                          # of jitter and random stragglers
    shared_cores = 2                  # left out unless the nodes are hosts of one machine and share so many cores

    [node]                            # what every node is
    compute_speed = 1.0               # times as fast as the machine on which processor time is measured
    iteration_s = 1.3                 # seconds of forward, backward and update; left out to take measured ones
    slowdown = 1.0                    # everything it computes takes so many times as long: a fixed straggler
    call_us = 0.0                     # processor time per collective, before its first message
    overhead_us = 0.0                 # processor time per message sent, and per message received
    copy_us_per_mib = 0.0             # processor time per MiB sent, and per MiB received
    overlap_slowdown = 1.0            # computing takes so many times as long while the node is sending

    [link]                            # from each node to its successor
    latency_us = 50.0                 # from when the last byte has left until it can be used
    jitter_us = 0.0                   # mean of an exponential addition to the latency, per message
    bandwidth_gbps = 10.0             # Gbit/s of payload
    packet_loss = 0.0                 # share of packets sent again: what is left of the bandwidth is 1 - packet_loss
    burst_bytes = 0                   # bytes that a rested link passes at once (a token bucket's depth)
    full_duplex = true                # whether nodes' ports send and receive at the same time; the same for all

    [racks]                           # left out if nothing is shared
    size = 3                          # nodes in a rack
    uplink_gbps = 10.0                # of each rack, to and from the others, in each direction
    placement = "block"               # which nodes: "block" (0 1 2, 3 4 5) or "round-robin" (0 2 4, 1 3 5)

    [stragglers]                      # at random: in each collective, each node may be one
    probability = 0.0
    slowdown = 1.0

    [rates]                           # amounts per second and node; what is missing is measured, see `Codec.amounts`
    add = 4e9                         # payload bytes added

    [override.node.3]                 # what is different about node 3: keys of [node]
    compute_speed = 0.5

    [override.link.2]                 # what is different about the link from node 2 to its successor: keys of [link]
    bandwidth_gbps = 1.0

Packet loss is a loss of bandwidth here, nothing more: how a protocol backs off is not modelled. `iteration_s` and
`[rates]` are the cluster's own and not scaled by `compute_speed`, which is for processor time measured elsewhere.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

MAX_NODES = 10_000_000


class ClusterError(ValueError):
    """A cluster's file can't be read or says something impossible; the message names file, key and value."""


def _key(default: Any, **bounds: Any) -> Any:
    """A key of the file. Bounds are `above`, `least`, `below`, `most` (of numbers) and `among` (of texts)."""
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class Node:
    """Properties of a node; units are in the names, the meaning of each is in the module's text."""

    compute_speed: float = _key(1.0, above=0)
    iteration_s: float | None = _key(None, above=0)
    slowdown: float = _key(1.0, above=0)
    call_us: float = _key(0.0, least=0)
    overhead_us: float = _key(0.0, least=0)
    copy_us_per_mib: float = _key(0.0, least=0)
    overlap_slowdown: float = _key(1.0, least=1)


@dataclass(frozen=True)
class Link:
    """The link from a node to its successor."""

    latency_us: float = _key(0.0, least=0)
    jitter_us: float = _key(0.0, least=0)
    bandwidth_gbps: float = _key(10.0, above=0)
    packet_loss: float = _key(0.0, least=0, below=1)
    burst_bytes: int = _key(0, least=0)
    full_duplex: bool = _key(True)

    @property
    def bytes_per_s(self) -> float:
        """Bytes of payload that the link passes in a second, after losses."""
        return self.bandwidth_gbps * 1e9 / 8 * (1 - self.packet_loss)


@dataclass(frozen=True)
class Racks:
    """Racks of nodes that share an uplink."""

    size: int = _key(1, least=1)
    uplink_gbps: float = _key(10.0, above=0)
    placement: str = _key("block", among=("block", "round-robin"))

    def of(self, node: int, nodes: int) -> int:
        """The rack that a node is in."""
        racks = -(-nodes // self.size)
        return node // self.size if self.placement == "block" else node % racks


@dataclass(frozen=True)
class Stragglers:
    """Random slowdowns: in each collective, each node is slow with this probability."""

    probability: float = _key(0.0, least=0, most=1)
    slowdown: float = _key(1.0, least=1)


@dataclass(frozen=True)
class Cluster:
    """All that the emulator needs to know of a cluster. `dataclasses.replace` and `with_nodes` make others from it."""

    name: str = "cluster"
    source: str = ""
    nodes: int = _key(1, least=1, most=MAX_NODES)
    seed: int = _key(0, least=0, below=2**63)
    shared_cores: int | None = _key(None, least=1)
    node: Node = Node()
    link: Link = Link()
    racks: Racks | None = None
    stragglers: Stragglers = Stragglers()
    rates: Mapping[str, float] = field(default_factory=dict)
    other_nodes: Mapping[int, Node] = field(default_factory=dict)
    other_links: Mapping[int, Link] = field(default_factory=dict)

    def node_at(self, rank: int) -> Node:
        return self.other_nodes.get(rank, self.node)

    def link_from(self, rank: int) -> Link:
        return self.other_links.get(rank, self.link)

    @property
    def homogeneous(self) -> bool:
        """Whether all nodes and links are alike at all times, with no memory, and nothing is shared between them."""
        return (
            not self.other_nodes
            and not self.other_links
            and self.racks is None
            and self.shared_cores is None
            and self.link.jitter_us == 0
            and self.link.burst_bytes == 0
            and self.link.full_duplex
            and self.stragglers.probability * (self.stragglers.slowdown - 1) == 0
        )

    def with_nodes(self, nodes: int, **changes: Any) -> Cluster:
        """The same cluster with another number of nodes, which all are as `[node]` and `[link]` say.

        Args:
            changes: new values of other fields; a dict for `node` or `link` changes only these keys.
        """
        values: dict[str, Any] = {"nodes": nodes, "other_nodes": {}, "other_links": {}, **changes}
        for part in ("node", "link"):
            if isinstance(values.get(part), Mapping):
                values[part] = dataclasses.replace(getattr(self, part), **values[part])
        return dataclasses.replace(self, **values)


#: Tables of the file, and the classes that they become; the other keys are `Cluster`'s own.
PARTS: dict[str, type[Any]] = {"node": Node, "link": Link, "racks": Racks, "stragglers": Stragglers}
OVERRIDES: dict[str, type[Any]] = {"node": Node, "link": Link}
SCALARS = ("name", "source", "nodes", "seed", "shared_cores")
BOUNDS = {
    "above": (operator.gt, "above"),
    "least": (operator.ge, "at least"),
    "below": (operator.lt, "below"),
    "most": (operator.le, "at most"),
}


def read(path: Path) -> Cluster:
    """Read the cluster that a file describes.

    Raises:
        ClusterError: the file is wrong; the message has its name, the key and the value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterError(f"{path}: can't be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ClusterError(f"{path}: not a TOML file: {error}") from error
    return parse(table, str(path))


def write(cluster: Cluster, path: Path) -> None:
    """Write a file, as a whole or not at all, from which `read` makes the same cluster."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(tomli_w.dumps(as_table(cluster)), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def as_table(cluster: Cluster) -> dict[str, Any]:
    """The table from which `parse` makes the same cluster."""

    def keys(part: Any) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(part).items() if value is not None}

    table = {name: getattr(cluster, name) for name in SCALARS if getattr(cluster, name) is not None}
    table |= {name: keys(getattr(cluster, name)) for name in PARTS if getattr(cluster, name) is not None}
    table["rates"] = dict(cluster.rates)
    others = {"node": cluster.other_nodes, "link": cluster.other_links}
    table["override"] = {
        name: {str(rank): _different(keys(part), keys(getattr(cluster, name))) for rank, part in parts.items()}
        for name, parts in others.items()
        if parts
    }
    return {name: value for name, value in table.items() if value != {}}


def _different(table: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if base.get(key) != value}


def parse(table: Mapping[str, Any], where: str) -> Cluster:
    """Make the cluster that a TOML table describes.

    Args:
        table: the table.
        where: its name in errors.
    Raises:
        ClusterError: the table is wrong; the message has `where`, the key and the value.
    """
    try:
        known = (*SCALARS, *PARTS, "rates", "override")
        _refuse_unknown(table, known, "")
        values = _values(Cluster, {key: table[key] for key in SCALARS if key in table}, "")
        if "nodes" not in values:
            raise ClusterError("`nodes`, the number of workers, is missing")
        for name, kind in PARTS.items():
            if name in table:
                values[name] = kind(**_values(kind, _table(table[name], name), f"{name}."))
        rates = _table(table.get("rates", {}), "rates")
        values["rates"] = {key: _number(rate, f"rates.{key}", {"above": 0}) for key, rate in rates.items()}
        overrides = _table(table.get("override", {}), "override")
        _refuse_unknown(overrides, OVERRIDES, "override.")
        for name, kind in OVERRIDES.items():
            common = values.get(name, kind())
            parts = {}
            for rank, part in _table(overrides.get(name, {}), f"override.{name}").items():
                key = f"override.{name}.{rank}"
                if not (rank.isascii() and rank.isdigit() and str(int(rank)) == rank and int(rank) < values["nodes"]):
                    raise ClusterError(f"`{key}`: nodes are numbered 0 to {values['nodes'] - 1} (`nodes` - 1)")
                if name == "link" and "full_duplex" in _table(part, key):
                    raise ClusterError(f"`{key}.full_duplex`: ports are alike on all nodes, so only [link] says it")
                parts[int(rank)] = dataclasses.replace(common, **_values(kind, _table(part, key), f"{key}."))
            values[f"other_{name}s"] = parts
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from None
    return Cluster(**values)


def _table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ClusterError(f"`{key}` must be a table, got {value!r}")
    return value


def _refuse_unknown(table: Mapping[str, Any], known: Any, prefix: str) -> None:
    for key, value in table.items():
        if key not in known:
            raise ClusterError(f"unknown key `{prefix}{key}` (= {value!r}); known are {', '.join(known)}")


def _values(kind: type[Any], table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values of one dataclass's keys, checked."""
    entries = {entry.name: entry for entry in dataclasses.fields(kind)}
    _refuse_unknown(table, entries, prefix)
    return {key: _value(entries[key], value, prefix + key) for key, value in table.items()}


def _value(entry: dataclasses.Field[Any], value: Any, key: str) -> Any:
    wanted = str(entry.type).removesuffix(" | None")
    if wanted == "str":
        among = entry.metadata.get("among")
        if not isinstance(value, str) or (among and value not in among):
            raise ClusterError(f"`{key}` must be {' or '.join(map(repr, among)) if among else 'text'}, got {value!r}")
        return value
    if wanted == "bool":
        if not isinstance(value, bool):
            raise ClusterError(f"`{key}` must be true or false, got {value!r}")
        return value
    number = _number(value, key, entry.metadata)
    if wanted == "int" and not isinstance(value, int):
        raise ClusterError(f"`{key}` must be a whole number, got {value!r}")
    return number


def _number(value: Any, key: str, bounds: Mapping[str, Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ClusterError(f"`{key}` must be a finite number, got {value!r}")
    for bound, limit in bounds.items():
        holds, words = BOUNDS[bound]
        if not holds(value, limit):
            raise ClusterError(f"`{key}` must be {words} {limit}, got {value!r}")
    return value
