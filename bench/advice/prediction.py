"""Seconds per iteration of a model under DDP on a described cluster, by method: the emulator's exchanges, overlapped.

A collective takes what `ring.dry` counts for it on the cluster's links. An all-gather is the second half of a ring
all-reduce of all payloads, without its additions: (N-1) payloads through every link. Processor time that the emulator
counts for messages and additions is what an exchange keeps a core busy for (`bench.virtual.ddp_iteration`).

A node computes forward, backward, the step, encoding and decoding on what it has: `shared_cores` over the nodes, or one
device. Decoding beside backward slows it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.advice.costs import PLAIN, BucketCost, MethodCost, RoundCost, SentBytes
from bench.advice.model import Profile
from bench.virtual.ddp_iteration import BucketRound, DDPIteration, Load, TimedBucket, iteration
from ring import dry
from ring.cluster import Cluster
from ring.codec import IdentityCodec


class FittedNetwork:
    """The collectives of one cluster; each size is emulated once.

    Args:
        gather_factor: an all-gather takes so many times as long as its bytes.
        even_steps: it takes the 2(N-1) steps of an all-reduce: N-1 more of its own, which carry next to nothing.
    """

    def __init__(self, cluster: Cluster, gather_factor: float = 1.0, even_steps: bool = False) -> None:
        self.cluster, self._gather_factor, self._even_steps = cluster, gather_factor, even_steps
        self._gathering = dataclasses.replace(cluster, rates={**cluster.rates, "add": sys.float_info.max})
        self._loads: dict[SentBytes, Load] = {}

    def load(self, sent: SentBytes) -> Load:
        if sent not in self._loads:
            reduce = sent.collective == "all_reduce"
            num_bytes = sent.num_bytes if reduce else sent.num_bytes * self.cluster.nodes
            cluster, share = (self.cluster, 1.0) if reduce else (self._gathering, 0.5)
            many = cluster.homogeneous and cluster.nodes >= dry.LEAST_NODES
            run = dry.closed_form if many else dry.all_reduce  # within 1 %
            found = run(cluster, IdentityCodec(), -(-num_bytes // 4))
            busy_s = sum(seconds for kind, seconds in found.seconds.items() if kind != "wait")
            longer = 1.0 if reduce else self._gather_factor
            more_s = (
                share * run(cluster, IdentityCodec(), cluster.nodes).time_s if self._even_steps and not reduce else 0.0
            )
            self._loads[sent] = Load(longer * share * found.time_s + more_s, share * busy_s)
        return self._loads[sent]

    def wire_bytes(self, sent: SentBytes) -> float:
        """What each rank sends."""
        nodes = self.cluster.nodes
        return sent.num_bytes * (2 * (nodes - 1) / nodes if sent.collective == "all_reduce" else nodes - 1)


@dataclass(frozen=True)
class Window:
    """GradiVeQ's: so many plain iterations to sample, bases gathered once, so many compressed ones."""

    sample: int
    compress: int


@dataclass(frozen=True)
class Prediction:
    """One method's iteration.

    Attributes:
        time_s: seconds of an iteration; of GradiVeQ, the mean over a window.
        compressed: an iteration that is compressed, in detail.
        bytes_sent: bytes that each rank sends, likewise a mean.
    """

    time_s: float
    compressed: DDPIteration
    bytes_sent: float


@dataclass
class Situation:
    """A model on a cluster.

    Attributes:
        profile: seconds of an iteration's computing on a node that isn't slowed down.
        ready_s: when each bucket is ready, in that profile.
        copies_s: seconds in which DDP copies gradients into each bucket, and back.
        costs: costs by method, PLAIN among them.
        windows: windows of the methods that have them.
        rated: whether the cluster's own rates say what PCA and copying take; otherwise what was measured here does.
        gather_factor, even_steps: of `FittedNetwork`.
    """

    cluster: Cluster
    profile: Profile
    ready_s: Sequence[float]
    copies_s: Sequence[float]
    costs: Mapping[str, MethodCost]
    windows: Mapping[str, Window] = field(default_factory=dict)
    rated: bool = False
    gather_factor: float = 1.0
    even_steps: bool = False
    _networks: dict[float, FittedNetwork] = field(default_factory=dict, repr=False)

    @property
    def slowdown(self) -> float:
        """How many times as long the slowest node computes: all wait for it."""
        nodes = [self.cluster.node, *self.cluster.other_nodes.values()]
        return max(node.slowdown for node in nodes)

    @property
    def cores(self) -> float:
        """The cores of one node."""
        shared = self.cluster.shared_cores
        return 1.0 if shared is None else shared / self.cluster.nodes

    def network(self, gbps: float) -> FittedNetwork:
        if gbps not in self._networks:
            link = dataclasses.replace(self.cluster.link, bandwidth_gbps=gbps)
            same = gbps == self.cluster.link.bandwidth_gbps
            cluster = self.cluster if same else dataclasses.replace(self.cluster, link=link)
            self._networks[gbps] = FittedNetwork(cluster, self.gather_factor, self.even_steps)
        return self._networks[gbps]

    def with_even_steps(self) -> Situation:
        """The same, but that an all-gather has no fewer steps than an all-reduce."""
        return dataclasses.replace(self, even_steps=True, _networks={})

    @property
    def computing_s(self) -> float:
        """Forward, backward and update, without any exchange."""
        return self._iteration([]).time_s

    def predict(self, method: str, gbps: float | None = None) -> Prediction:
        """A method's iteration.

        Args:
            gbps: bandwidth of the links, instead of the cluster's own bandwidth.
        Raises:
            ClusterError: the cluster has no rate for something.
        """
        network = self.network(self.cluster.link.bandwidth_gbps if gbps is None else gbps)
        cost = self.costs[method]
        compressed = self._iteration(
            [
                self._bucket(bucket, ready_s, copy_s, cost.by_rates, network)
                for bucket, ready_s, copy_s in zip(cost.buckets, self.ready_s, self.copies_s, strict=True)
            ]
        )
        sent = sum(network.wire_bytes(one) for bucket in cost.buckets for each in bucket.rounds for one in each.sent)
        window = self.windows.get(method)
        if window is None:
            return Prediction(compressed.time_s, compressed, sent)
        plain = self.predict(PLAIN, gbps)
        bases = SentBytes("all_gather", -(-cost.fit_bytes // self.cluster.nodes))
        total_s = window.sample * plain.time_s + window.compress * compressed.time_s + network.load(bases).seconds
        total = window.sample * plain.bytes_sent + window.compress * sent + network.wire_bytes(bases)
        length = window.sample + window.compress
        return Prediction(total_s / length, compressed, total / length)

    def processor_s(self, method: str) -> float:
        """Processor time of one node in an iteration, on the cluster's own links."""
        network, cost = self.network(self.cluster.link.bandwidth_gbps), self.costs[method]
        total_s = self.slowdown * (self.profile.seconds + sum(self.copies_s))
        for bucket in cost.buckets:
            total_s += sum(self._host_s(one.compute_s) for one in bucket.rounds) + self._decoding_s(
                bucket, cost.by_rates
            )
            total_s += sum(network.load(sent).busy_s for one in bucket.rounds for sent in one.sent)
        return total_s

    def _iteration(self, buckets: Sequence[TimedBucket]) -> DDPIteration:
        profile, slow = self.profile, self.slowdown
        # DDP copies each bucket's means to the gradients at the end of backward.
        copying_s = slow * sum(self.copies_s) / 2 if buckets else 0.0
        return iteration(
            slow * profile.forward_s,
            slow * profile.backward_s,
            slow * profile.update_s + copying_s,
            buckets,
            cores=self.cores,
            overlap_slowdown=self.cluster.node.overlap_slowdown,
        )

    def _bucket(
        self, cost: BucketCost, ready_s: float, copy_s: float, by_rates: bool, network: FittedNetwork
    ) -> TimedBucket:
        rounds = []
        for number, one in enumerate(cost.rounds):
            computing_s = self._encoding_s(cost, one, by_rates) if number == 0 else self._host_s(one.compute_s)
            if number == 0:
                computing_s += self.slowdown * copy_s / 2
            loads = tuple(network.load(sent) for sent in one.sent)
            rounds.append(BucketRound(computing_s, loads))
        return TimedBucket(self.slowdown * ready_s, tuple(rounds), self._decoding_s(cost, by_rates))

    def _host_s(self, seconds: float) -> float:
        """Measured on this machine."""
        return seconds * self.slowdown / self.cluster.node.compute_speed

    def _encoding_s(self, cost: BucketCost, first: RoundCost, by_rates: bool) -> float:
        if self.rated and by_rates and first.compute_s > 0:
            return self._by_rates(cost, "pca.encode")
        return self._host_s(first.compute_s)

    def _decoding_s(self, cost: BucketCost, by_rates: bool) -> float:
        if self.rated and by_rates and cost.decode_s > 0:
            return self._by_rates(cost, "pca.decode")
        return self._host_s(cost.decoding_s(self.cluster.nodes))

    def _by_rates(self, cost: BucketCost, rate: str) -> float:
        seconds = 4 * cost.length / self.cluster.rates["copy"]
        if cost.multiplications:
            seconds += cost.multiplications / self.cluster.rates[rate]
        return self.slowdown * seconds


@dataclass(frozen=True)
class Compared:
    """The predictions at one bandwidth.

    Attributes:
        x: Gbit/s.
    """

    x: float
    plain_s: float
    time_s: float

    @property
    def speedup(self) -> float:
        return self.plain_s / self.time_s


@dataclass(frozen=True)
class Against:
    """A method beside plain DDP, by bandwidth: a sweep for `bench.virtual.scaling.stretches`."""

    situation: Situation
    method: str
    whole: bool = False

    def at(self, gbps: float) -> Compared:
        plain_s = self.situation.predict(PLAIN, gbps).time_s
        return Compared(gbps, plain_s, self.situation.predict(self.method, gbps).time_s)


def bandwidths(least: float, most: float, per_decade: int, own: float) -> list[float]:
    """Evenly spaced on a logarithmic scale, in Gbit/s, and the cluster's own."""
    count = max(1, round(per_decade * math.log10(most / least)))
    spaced = {least * (most / least) ** (place / count) for place in range(count + 1)}
    return sorted(spaced | {own})
