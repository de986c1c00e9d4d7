"""Which cluster's clock runs beside this machine's: the job's `--cluster`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.clusters import load
from bench.job.options import NO_CLUSTER
from ring.cluster import Cluster, ClusterError, parse

#: The cluster of the GradiVeQ paper's Fig. 7.
DEFAULT = "gradiveq-cpu"


def choose(name: str | None, recorded: Mapping[str, Any], ranks: int | None) -> Cluster | None:
    """The cluster to emulate, with a node for each rank.

    Args:
        name: the name of a preset or of a TOML file, or "none"; None for the default.
        recorded: what the run that is resumed recorded, its cluster among it; empty if none is.
        ranks: how many there are; None if there will be as many as the cluster has nodes.
    Raises:
        ClusterError: there is no such cluster, its file is wrong, or it can't have so many nodes.
    """
    if name == NO_CLUSTER:
        return None
    cluster = parse(recorded["cluster"], "the run's record") if recorded else load(name or DEFAULT)
    if ranks in (None, cluster.nodes):
        return cluster
    if cluster.other_nodes or cluster.other_links:
        raise ClusterError(
            f"{name}: `nodes` is {cluster.nodes}, some of which are described one by one (`override`), but there are "
            f"{ranks} ranks; start {cluster.nodes}, or none by leaving out mpirun"
        )
    return cluster.with_nodes(ranks, source=f"{cluster.source}; with {ranks} nodes instead of {cluster.nodes}")


def note(cluster: Cluster) -> str:
    """What has to be said beside the numbers of its clock."""
    node = cluster.node
    if node.iteration_s is not None:
        computing = f"computing takes {node.iteration_s:g} s an iteration there, whatever the model and the batch"
    elif node.compute_speed == 1:
        computing = "computing takes the processor time that it takes here"
    else:
        computing = f"computing takes the processor time that it takes here / {node.compute_speed:g}"
    source = f" ({cluster.source})" if cluster.source else ""
    return f"The clock of the cluster {cluster.name}, {cluster.nodes} nodes, is emulated{source}; {computing}."
