"""Should I compress? Overlap against hand-computed cases, break-even against closed form, words, bad input."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.advice import command as advise
from bench.advice import validation as advise_validation
from bench.advice.costs import FEW, PLAIN, BucketCost, MeasuredCosts, MethodCost, RoundCost, SentBytes, cost_of, measure
from bench.advice.model import Profile, Task, assign_buckets, build, profile, tensor_task
from bench.advice.prediction import Against, Situation, Window
from bench.advice.report import Answer, Asked, table, words
from bench.advice.risk import Elsewhere, Probed, closest, recorded
from bench.advice.validation import ClusterFit, Job, compare, judge
from bench.advice.validation_plan import Found
from bench.virtual.ddp_iteration import BucketRound, DDPIteration, Load, TimedBucket, iteration, shares
from bench.virtual.scaling import stretches
from gradiveq.compressors import COMPRESSORS
from gradiveq.methods import GradiVeQ, Method, Plain
from gradiveq.specs import parse
from ring.cluster import Cluster, Link, Node
from ring.machine import usable_cores
from tests.support.processes import ROOT
from tests.support.redrawn import check_drawn_again


def bucket(
    ready_s: float, network_s: float, encode_s: float = 0.0, decode_s: float = 0.0, busy_s: float = 0.0
) -> TimedBucket:
    return TimedBucket(ready_s, (BucketRound(encode_s, (Load(network_s, busy_s),)),), decode_s)


def overlapped(buckets: list[TimedBucket], **how: Any) -> DDPIteration:
    """Forward 1 s, backward 4 s, update 0.5 s."""
    return iteration(1.0, 4.0, 0.5, buckets, **how)


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_bound_by_computing_only_the_last_bucket_is_exposed() -> None:
    found = overlapped([bucket(1.0, 0.5), bucket(4.0, 0.25)])
    assert found.exchanges == ((2.0, 2.5), (5.0, 5.25))
    assert found.time_s == pytest.approx(1 + 4 + 0.25 + 0.5)
    assert found.exposed_s == pytest.approx(0.25)
    assert found.network_s == pytest.approx(0.75)


def test_bound_by_the_network_exchanges_queue() -> None:
    """start = max(ready, end of the one before)."""
    found = overlapped([bucket(1.0, 3.0), bucket(2.0, 2.0), bucket(4.0, 1.0)])
    assert found.exchanges == ((2.0, 5.0), (5.0, 7.0), (7.0, 8.0))
    assert found.time_s == pytest.approx(8.5)
    assert found.exposed_s == pytest.approx(3.0)


def test_encoding_delays_backward_and_decoding_runs_beside_the_next_exchange() -> None:
    buckets = [bucket(1.0, 2.0, 0.5, 0.25), bucket(4.0, 1.0, 0.5, 0.25)]
    found = overlapped(buckets, cores=2)
    # Encoded at 2 and 2.5; the second is ready 3 s of backward later, at 5.5, and encoded at 6.
    assert found.exchanges == ((2.5, 4.5), (6.0, 7.0))
    assert found.time_s == pytest.approx(7.25 + 0.5)
    # On one core the first decoding takes 0.25 s from backward.
    assert overlapped(buckets, cores=1).time_s == pytest.approx(7.5 + 0.5)


def test_two_rounds_wait_for_the_next_bucket_and_block_backward() -> None:
    two = [
        TimedBucket(1.0, (BucketRound(0.0, (Load(3.0),)), BucketRound(0.5, (Load(1.0),)))),
        TimedBucket(2.0, (BucketRound(0.0, (Load(1.0),)), BucketRound(0.0, (Load(1.0),)))),
    ]
    found = overlapped(two)
    # The second bucket's hook begins its first round at 3, waits for the first's until 5, computes 0.5, begins round 2
    # behind its own first (5 to 6), waits for that, and begins its own second round at 6; 2 s of backward are left.
    assert found.exchanges == ((2.0, 5.0), (5.0, 6.0), (6.0, 7.0), (7.0, 8.0))
    assert found.time_s == pytest.approx(8.5)


def test_cores_are_shared() -> None:
    assert shares([1.0, 0.25, 1.0], 1.0) == pytest.approx([0.375, 0.25, 0.375])
    assert shares([1.0, 0.0, 1.0], 4.0) == [1.0, 0.0, 1.0]
    # Half a core: all computing takes twice as long.
    assert overlapped([], cores=0.5).time_s == pytest.approx(11.0)
    # An exchange of 1 s that keeps a core busy for half of it takes that from backward: 3 s become 3.5.
    busy = overlapped([bucket(1.0, 1.0, busy_s=0.5), bucket(4.0, 0.25)])
    assert busy.time_s == pytest.approx(1 + 4 + 0.5 + 0.25 + 0.5)
    # A node that computes at half its speed while sending: 1 s of backward takes 2, of which 1 is lost.
    slow = overlapped([bucket(1.0, 1.0), bucket(4.0, 0.0)], overlap_slowdown=2.0)
    assert slow.time_s == pytest.approx(5.5 + 0.5)


def test_buckets_must_be_in_order() -> None:
    with pytest.raises(ValueError, match=r"`ready_s` must rise from 0 to at most 4.0 .*\[2.0, 1.0\]"):
        overlapped([bucket(2.0, 1.0), bucket(1.0, 1.0)])
    with pytest.raises(ValueError, match="`cores` must be above 0, got 0"):
        overlapped([], cores=0)


# --- predictions -----------------------------------------------------------------------------------------------------

ELEMENTS = 1_000_000
CLUSTER = Cluster("four", "made up", nodes=4, link=Link(bandwidth_gbps=1.0), rates={"add": 1e15, "copy": 1e15})


def made_cost(payload: int, encode_s: float = 0.0, decode_s: float = 0.0, what: str = "all_reduce") -> MethodCost:
    """One bucket."""
    rounds = (RoundCost(encode_s, (SentBytes(what, payload),)),)
    return MethodCost((BucketCost(rounds, decode_s, 0.0, ELEMENTS),), memory_bytes=4 * ELEMENTS)


def made_situation(**costs: MethodCost) -> Situation:
    """Backward 0.02 s, at whose end the only bucket is ready."""
    computing = Profile(0.01, 0.02, 0.001, (0.02,), 10**9, 8)
    everything = {PLAIN: replace(made_cost(4 * ELEMENTS), memory_bytes=0), **costs}
    return Situation(CLUSTER, computing, [0.02], [0.0], everything)


def test_what_collectives_take_on_the_links() -> None:
    """2(N-1)/N of a sum's bytes, N-1 payloads of a gather."""
    situation = made_situation(topk=made_cost(100_000, what="all_gather"))
    plain, topk = situation.predict(PLAIN), situation.predict("topk")
    assert situation.computing_s == pytest.approx(0.031)
    assert plain.bytes_sent == 1.5 * 4 * ELEMENTS
    assert topk.bytes_sent == 300_000
    assert plain.time_s == pytest.approx(0.031 + 1.5 * 4 * ELEMENTS / 125e6, rel=0.01)
    assert topk.time_s == pytest.approx(0.031 + 300_000 / 125e6, rel=0.01)
    assert situation.predict("topk", 10.0).time_s == pytest.approx(0.031 + 300_000 / 1.25e9, rel=0.01)


def test_break_even_is_where_saved_bytes_take_as_long_as_encoding() -> None:
    """All is exposed: (bytes - payload) / bandwidth = encode + decode."""
    situation = made_situation(half=made_cost(2 * ELEMENTS, 0.010, 0.005))
    against = Against(situation, "half")
    points = [against.at(gbps) for gbps in (0.01, 0.1, 1.0, 10.0, 100.0)]
    ((begin, end),) = stretches(points, against, lambda point: point.speedup > 1)
    assert begin is None
    assert end == pytest.approx(1.5 * 2 * ELEMENTS * 8 / 0.015 / 1e9, rel=0.01)


def test_gradiveq_is_the_mean_over_a_window() -> None:
    cost = replace(made_cost(ELEMENTS // 2), fit_bytes=800_000)
    situation = made_situation(gradiveq=cost)
    compressed_s, plain_s = situation.predict("gradiveq").time_s, situation.predict(PLAIN).time_s
    situation.windows = {"gradiveq": Window(100, 400)}
    bases_s = 3 * 200_000 / 125e6
    assert situation.predict("gradiveq").time_s == pytest.approx(
        (100 * plain_s + 400 * compressed_s + bases_s) / 500, rel=1e-3
    )


def test_the_clusters_rates_are_used_where_it_has_them() -> None:
    rates = {"add": 1e15, "copy": 4e8, "pca.encode": 1e9, "pca.decode": 5e8}
    cost = made_cost(ELEMENTS, 5.0, 5.0)
    (only,) = cost.buckets
    cost = replace(cost, buckets=(replace(only, multiplications=10**7),), by_rates=True)
    situation = made_situation(gradiveq=cost)
    slow_s = situation.predict("gradiveq").time_s
    situation.cluster, situation.rated = replace(CLUSTER, rates=rates, node=Node(slowdown=2.0)), True
    situation._networks.clear()
    fast_s = situation.predict("gradiveq").time_s
    network_s = 1.5 * ELEMENTS / 125e6
    assert slow_s == pytest.approx(0.031 + 10 + network_s, rel=0.01)
    assert fast_s == pytest.approx(2 * (0.031 + 0.01 + 0.01 + 0.01 + 0.02) + network_s, rel=0.01)


# --- the model and the methods on it ---------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Of 3x8x8 images; about 13,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1))
        return y


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def no_model() -> str:
    return "a string"


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def tiny_task() -> Task:
    return tensor_task("tiny", tiny_model(), (3, 8, 8))


def test_gradients_are_ready_from_the_last_layer_to_the_first() -> None:
    task = tiny_task()
    found = profile(task, 4, warm_up=1, repeats=3)
    by_name = dict(zip((name for name, _ in task.model.named_parameters()), found.ready_s, strict=True))
    assert 0 < by_name["fc.weight"] <= by_name["conv2.weight"] <= by_name["conv1.weight"] <= found.backward_s
    # Multiplications and additions: forward, and backward to weights and inputs, of which the images need none.
    layers = {"conv1": 64 * 3 * 9 * 16, "conv2": 64 * 16 * 9 * 16, "fc": 1024 * 10}
    assert found.flops == 2 * 4 * (3 * sum(layers.values()) - layers["conv1"])
    longer = found.lasting(1.0)
    assert longer.seconds == pytest.approx(1.0)
    assert longer.ready_s[0] / longer.backward_s == pytest.approx(found.ready_s[0] / found.backward_s)


@pytest.mark.parametrize("bucket_mb", [None, 0.001, 0.02])
def test_buckets_are_ddps(bucket_mb: float | None) -> None:
    model = build("resnet20").model
    parameters = list(model.parameters())
    ready_s = [float(len(parameters) - index) for index in range(len(parameters))]
    limits = [2**20, 25 * 2**20] if bucket_mb is None else [int(bucket_mb * 2**20)]
    order = list(reversed(range(len(parameters))))
    theirs, _ = dist._compute_bucket_assignment_by_size(
        [parameters[i] for i in order], limits, [False] * len(order), order
    )
    ours = assign_buckets(model, ready_s, bucket_mb)
    index_of = {id(p): index for index, p in enumerate(parameters)}
    assert [[index_of[id(p)] for p in one.parameters] for one in ours] == theirs
    assert [one.ready_s for one in ours] == [max(ready_s[i] for i in of) for of in theirs]


@pytest.fixture(scope="module")
def tiny() -> Task:
    task = tiny_task()
    task.loss(task.model, 4).backward()  # type: ignore[no-untyped-call]
    return task


def cost(task: Task, method: Method) -> MethodCost:
    buckets = assign_buckets(task.model, [float(i) for i, _ in enumerate(task.model.parameters())])
    return cost_of(method, task.model, buckets, repeats=2)


def test_the_hooks_own_code_says_what_is_sent(tiny: Task) -> None:
    elements = sum(p.numel() for p in tiny.model.parameters())
    vectors = sum(p.numel() for p in tiny.model.parameters() if p.dim() == 1)
    codes = FEW  # one digit of a code for each worker

    def payloads(method: Method) -> list[list[SentBytes]]:
        (only,) = cost(tiny, method).buckets
        assert only.length == elements
        return [list(one.sent) for one in only.rounds]

    assert payloads(Plain()) == [[SentBytes("all_reduce", 4 * (elements + codes))]]
    assert payloads(parse("half")) == [[SentBytes("all_reduce", 2 * (elements + codes))]]
    (((natural,),)) = payloads(parse("natural"))
    assert natural.collective == "all_gather"
    sizes = [p.numel() for p in tiny.model.parameters()]
    assert natural.num_bytes == 8 + sum(map(COMPRESSORS["natural"]().payload_bytes, sizes))
    first, second = payloads(parse("powersgd:1"))
    matrices = [(16, 27), (16, 144), (10, 1024)]
    assert first == [SentBytes("all_reduce", 4 * (vectors + sum(n for n, _ in matrices) + codes))]
    assert second == [SentBytes("all_reduce", 4 * sum(m for _, m in matrices))]
    lengths, threshold = payloads(parse("threshold:0.001"))
    assert lengths == [SentBytes("all_gather", 16)]
    assert 0 < threshold[0].num_bytes < 4 * elements


def test_rates_of_copying_are_for_what_copies(tiny: Task) -> None:
    """Not for all that stays on a GPU: top-k selects, and nothing says what that takes there."""
    specs = ("half", "randomk:0.01+ef", "topk:0.01+ef", "natural", "terngrad", "powersgd:4", "half^half")
    assert [spec for spec in specs if cost(tiny, parse(spec)).by_rates] == ["half", "randomk:0.01+ef"]


def test_gradiveqs_bases_and_what_methods_keep(tiny: Task) -> None:
    method = GradiVeQ(warmup=0, sample=50, compress=400, ratio=8, fit_slices="all", sampling=Plain())
    found = cost(tiny, method)
    (only,) = found.buckets
    # K = F*D of each layer, d = K/8, nine slices.
    shapes = [(48, 6), (256, 32)]
    assert only.multiplications == sum(9 * k * d for k, d in shapes)
    compressed = sum(9 * d for _, d in shapes)
    rest = 16 + 16 + 10 + 10_240
    assert only.rounds[0].sent == (SentBytes("all_reduce", 4 * (compressed + rest + FEW)),)
    assert found.fit_bytes == sum(4 * (k * d + d) for k, d in shapes)
    assert found.memory_bytes == found.fit_bytes + 4 * (9 * 48 + 9 * 256) + 4 * compressed
    elements = 9 * 48 + 9 * 256
    assert found.sampling_bytes == 12 * elements
    assert found.samples_bytes >= 4 * (48 * 48 + 256 * 256)  # covariances, as 450 rows are more than K
    assert found.extra_bytes(10**9) == max(found.memory_bytes, 12 * elements + 1)
    elements = sum(p.numel() for p in tiny.model.parameters())
    assert cost(tiny, parse("topk:0.01+ef")).memory_bytes == 4 * elements
    assert cost(tiny, parse("topk:0.01")).memory_bytes == 0


def test_what_the_hook_cant_carry_is_refused_with_the_reason() -> None:
    task = tensor_task("perceptron", perceptron(), (3, 8, 8))
    methods = {name: parse(name) for name in ("half", "qsgd", "threshold:auto")}
    window = GradiVeQ(warmup=0, sample=10, compress=10, ratio=8, fit_slices="all", sampling=Plain())
    found = measure(task, {**methods, "gradiveq": window}, 2)
    assert set(found.costs) == {PLAIN, "half"}
    assert "GradiVeQ compresses the weights of convolutions" in found.refused["gradiveq"]
    assert "at every hop of a ring" in found.refused["qsgd"]
    assert found.costs[PLAIN].buckets[0].rounds[0].compute_s == 0
    also = measure(task, {"half": parse("half"), "gradiveq": replace(window, slice_size=16)}, 2, also=("*.weight",))
    assert not also.refused
    # d = 2 of K = 16, and the biases.
    assert also.costs["gradiveq"].buckets[0].rounds[0].sent == (
        SentBytes("all_reduce", 4 * (192 * 10 // 8 + 10 + FEW)),
    )


# --- risk ------------------------------------------------------------------------------------------------------------


def test_recorded_results_are_found_by_their_setting(tmp_path: Path) -> None:
    assert recorded(tmp_path) == {}
    found = recorded(ROOT / "results")
    other = [Elsewhere("topk:0.01+ef", "x", "y", "resnet9"), Elsewhere("topk:0.01+ef", "mine", "y", "lstm")]
    assert [one.result for one in closest(parse("topk:0.01+ef"), "topk:0.01+ef", "lstm", {"topk": other})] == [
        "mine",
        "x",
    ]
    for name in ("topk", "gradiveq", "terngrad"):
        assert found[name]
        assert all("instead of" in one.result and (ROOT / "results" / one.source).is_dir() for one in found[name])
    assert closest(parse("topk:0.01+ef"), "topk:0.01+ef", "vgg", found)[0].setting == "topk:0.01+ef"
    assert len(closest(parse("topk:0.7"), "topk:0.7", "vgg", found)) == len(found["topk"])
    window = GradiVeQ(warmup=0, ratio=8, fit_slices="all")
    (one,) = closest(window, "gradiveq", "vgg", found)
    assert one.setting == "gradiveq, ratio 8, all slices"
    assert closest(parse("natural"), "natural", "vgg", {}) == []
    rows = [{"method": "torch:none", "accuracies": [0.5, 0.7]}, {"method": "topk:0.1+ef", "accuracies": [0.4, 0.5]}]
    (tmp_path / "ddp").mkdir()
    (tmp_path / "ddp" / "ddp.json").write_text(json.dumps({"rows": rows, "options": {"model": "alexnet"}}))
    (one,) = closest(parse("topk:0.1"), "topk:0.1+ef", "vgg", recorded(tmp_path))
    assert one == Elsewhere("topk:0.1+ef", "45.0 % instead of 60.0 % (alexnet, 2 seeds)", "ddp", "alexnet")
    (tmp_path / "layerwise").mkdir()
    (tmp_path / "layerwise" / "layerwise.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        recorded(tmp_path)


# --- words -----------------------------------------------------------------------------------------------------------


def made_answer(gbps: float, probed: dict[str, Probed] | None = None, situation: Situation | None = None) -> Answer:
    if situation is None:
        situation = made_situation(
            half=made_cost(2 * ELEMENTS, 0.002, 0.001), topk=made_cost(80_000, 0.1, 0.1, "all_gather")
        )
    link = replace(situation.cluster.link, bandwidth_gbps=gbps)
    situation.cluster = replace(situation.cluster, link=link)
    asked = Asked(
        "mymodel",
        MeasuredCosts(situation.profile, (ELEMENTS,), (0.02,), (0.0,), situation.costs, {"qsgd": "per hop"}),
        probed or {},
        "not made",
    )
    sweeps = {name: Against(situation, name) for name in situation.costs if name != PLAIN}
    points = {name: [one.at(x) for x in (0.01, 0.1, 1.0, 10.0, 100.0)] for name, one in sweeps.items()}
    gains = {name: stretches(points[name], sweeps[name], lambda point: point.speedup > 1) for name in sweeps}
    pays = {name: stretches(points[name], sweeps[name], lambda point: point.speedup >= 1.05) for name in sweeps}
    predictions = {name: situation.predict(name) for name in situation.costs}
    elsewhere = dict.fromkeys(sweeps, ()) | {
        "topk": [Elsewhere("topk:0.01", "74 % instead of 79 %", "layerwise", "alexnet")]
    }
    return Answer(asked, situation, 8, 8.0, "measured", predictions, gains, pays, points, elsewhere)


def test_words_where_it_pays() -> None:
    found = made_answer(0.1, {"half": Probed(1e-6, 2.0), "topk": Probed(0.9, 50.0)})
    lines = words(found)
    assert lines[0].startswith("Yes, as far as time goes: topk makes an iteration ")
    assert "Of 2 methods 2 pay here" in lines[0]
    assert (
        "topk loses 0.9 of a gradient's squared norm before any error feedback. The least is lost by half (1e-06)"
        in lines[0]
    )
    rows = table(found, "github").splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [PLAIN, "topk", "half", "qsgd"]
    assert "not possible: per hop" in rows[-1]
    assert "up to" in rows[4]
    assert "loss 0.9 at ratio 50; topk:0.01: 74 % instead of 79 %" in rows[3]


def test_words_where_nothing_pays() -> None:
    found = made_answer(50.0)
    lines = words(found)
    assert lines[0].startswith("No: nothing pays here (an iteration 5% faster or more). The best, half, is ")
    assert "Compression would begin to pay below " in lines[0]
    assert any(line.startswith("Slower than plain DDP here: ") and "topk" in line for line in lines)
    assert "What these do to accuracy is unknown: half." in lines


def small_answer(gbps: float, **costs: MethodCost) -> Answer:
    """40 kB between 16 nodes: 30 steps of 50 us in a sum, 15 in a gather, and those of their bytes."""
    cluster = replace(CLUSTER, nodes=16, link=Link(latency_us=50.0))
    computing = Profile(0.001, 0.001, 0.0, (0.001,), 10**9, 8)
    return made_answer(
        gbps, situation=Situation(cluster, computing, [0.001], [0.0], {PLAIN: made_cost(40_000), **costs})
    )


def test_words_where_only_the_number_of_steps_is_saved() -> None:
    found = small_answer(10.0, topk=made_cost(100, what="all_gather"), natural=made_cost(10_000, what="all_gather"))
    plain_s, topk_s = found.predictions[PLAIN].time_s, found.predictions["topk"].time_s
    assert plain_s == pytest.approx(0.002 + 30 * 52e-6, rel=0.01)
    assert topk_s == pytest.approx(0.002 + 15 * 50e-6, rel=0.01)
    lines = words(found)
    assert lines[0].startswith(
        f"Perhaps: topk makes an iteration {plain_s / topk_s:.2f} times as fast. Of 2 methods 2 pay here: topk "
    )
    assert " That is only because an all-gather takes half of the steps of an all-reduce, and what l" in lines[0]
    assert f"with as many steps: topk {plain_s / (topk_s + 15 * 50e-6):.2f}, natural " in lines[0]
    assert "everywhere" not in lines[0]
    # 150 kB instead of 75.
    assert any(
        line.startswith("No fewer bytes than plain DDP's: natural. Where the table calls that") for line in lines
    )


def test_what_pays_by_bytes_is_named_first() -> None:
    """Though what pays by steps is faster."""
    found = small_answer(1.0, few=made_cost(4), natural=made_cost(5_000, what="all_gather"))
    assert found.by_speed == ["natural", "few"]
    first = words(found)[0]
    assert first.startswith(
        f"Yes, as far as time goes: few makes an iteration {found.speedup('few'):.2f} times as fast"
    )
    assert " For natural that is only because an all-gather" in first
    assert "with as many steps: natural 1.00." in first
    few = words(small_answer(1.0, few=made_cost(4), topk=made_cost(100, what="all_gather")))[0]
    assert few.startswith("Yes, as far as time goes: topk")
    assert "only because" not in few


# --- the command -----------------------------------------------------------------------------------------------------


def test_it_answers_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advise, "PER_DECADE", 1)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "new" / "folder"
    arguments = ["--model", f"{__name__}:tiny_model", "--input", "3x8x8", "--batch-size", "2", "--nodes", "4"]
    arguments += ["--bandwidth", "0.1", "--methods", "half,gradiveq,topk:0.01+ef", "--out", str(out), "--latency", "5"]
    arguments += ["--also", "fc.*", "--results", str(tmp_path / "nothing")]
    assert advise.main([*arguments, "--seconds-per-iteration", "0.5"]) == 0
    text = capsys.readouterr().out
    assert f"Should I compress? {__name__}.tiny_model on 4-nodes-0.1gbps" in text
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "record.json", "table.md"]
    check_drawn_again(out)
    record = json.loads((out / "record.json").read_text())
    assert record["forward_s"] + record["backward_s"] + record["update_s"] == pytest.approx(0.5)
    assert record["cluster"]["link"]["latency_us"] == 5
    assert set(record["methods"]) == {PLAIN, "half", "gradiveq", "topk:0.01+ef"}
    assert record["methods"]["half"]["speedup"] == pytest.approx(
        record["methods"][PLAIN]["iteration_s"] / record["methods"]["half"]["iteration_s"]
    )
    assert record["words"][0] in (out / "table.md").read_text()
    (missing,) = [line for line in record["words"] if "--results" in line]
    assert missing.startswith(f"No results of other models were found in {tmp_path / 'nothing'}. ")
    assert any("K/d = 8, and compresses fc.* besides convolutions" in line for line in record["words"])
    assert any("gradiveq.ddp.probe(model, also=('fc.*',))" in line for line in record["words"])
    payload, weights = record["methods"]["gradiveq"]["payload_bytes"], 48 * 9 + 256 * 9 + 10_240
    assert payload == 4 * (weights // 8 + 16 + 16 + 10 + FEW)


def test_a_probe_measures_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = advise.parse(
        [
            "--model",
            f"{__name__}:small_images",
            "--input",
            "3x32x32",
            "--batch-size",
            "2",
            "--nodes",
            "2",
            "--bandwidth",
            "1",
            "--methods",
            "half,gradiveq,topk:0.01",
            "--ratio",
            "8",
            "--probe",
            "20",
        ]
    )
    asked = advise.ask(options)
    assert 0 < asked.probed["half"].loss < 1e-4  # type: ignore[operator]
    assert asked.probed["half"].ratio == pytest.approx(2, rel=0.01)
    assert 0.3 < asked.probed["topk:0.01"].loss < 1  # type: ignore[operator]
    assert 0 < asked.probed["gradiveq"].loss < 1  # type: ignore[operator]
    assert "Fashion-MNIST sample" in asked.probe


def small_images(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, classes))


def five_classes() -> nn.Module:
    return small_images(5)


def pixels() -> nn.Module:
    return nn.Conv2d(3, 12, 1)


class Particular(nn.Module):
    """Returns a tuple, and wants more than one image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_images()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        if x.shape[0] == 1:
            raise RuntimeError("one image is\nnot enough")
        return self.net(x), None


def particular() -> nn.Module:
    return Particular()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "five_classes",
            "as the model must return scores for 10 classes or more (Fashion-MNIST sample), got 2x5 numbers for 2",
        ),
        ("pixels", "got 2x12x32x32 numbers for 2 images; probe your own training: gradiveq.ddp.probe(model)"),
        ("particular", None),
    ],
)
def test_a_model_that_the_probe_is_not_for_is_answered_nevertheless(
    model: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    asked = ask_for_images(model)
    assert asked.measured.costs.keys() == {PLAIN, "half"}
    if said is None:  # the first of what it returns
        assert 0 < asked.probed["half"].loss < 1e-4  # type: ignore[operator]
        monkeypatch.setattr(advise, "PROBE_BATCH", 1)
        asked = ask_for_images(model)
        said = "not made, as the model can't be trained on Fashion-MNIST sample: RuntimeError: one image is; probe"
    assert not asked.probed
    assert asked.probe.startswith("not made, as ")
    assert said in asked.probe


def ask_for_images(model: str) -> Asked:
    """Batches of 2."""
    arguments = ["--model", f"{__name__}:{model}", "--input", "3x32x32", "--batch-size", "2", "--probe", "3"]
    return advise.ask(advise.parse([*arguments, "--methods", "half", "--nodes", "2", "--bandwidth", "1"]))


CLUSTERED = ["--cluster", "v100-10gbe"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which cluster? Give --cluster NAME"),
        (["--cluster", "v100"], "there is no cluster 'v100': give gradiveq-cpu"),
        (["--nodes", "1", "--bandwidth", "10"], "one node has nobody to exchange gradients with; `nodes` must be 2 or"),
        (["--nodes", "0", "--bandwidth", "10"], "argument --nodes: must be a whole number of at least 1, got 0"),
        (["--nodes", "4", *CLUSTERED], "--nodes, --bandwidth and --latency describe a cluster; --cluster names"),
        (["--model", "vgg", *CLUSTERED], "`--model` must be one of resnet20, "),
        (["--model", "bench.nowhere:f", *CLUSTERED], "`--model` bench.nowhere:f can't be imported: ModuleNotFound"),
        (
            ["--model", f"{__name__}:no_model", "--input", "3x8x8", *CLUSTERED],
            "no_model() must return a torch.nn.Module, got <class 'str'>",
        ),
        (["--model", f"{__name__}:tiny_model", *CLUSTERED], f"`--input` is needed with {__name__}:tiny_model"),
        (
            ["--model", f"{__name__}:tiny_model", "--input", "3x9x9", *CLUSTERED],
            "can't be trained on such an `--input`: RuntimeError: mat1 and mat2",
        ),
        (["--model", "resnet20", "--input", "3xx", *CLUSTERED], "argument --input: must be like 3x224x224, got 3xx"),
        (["--methods", "topp", *CLUSTERED], "method 'topp': unknown method 'topp'"),
        (["--batch-size", "0", *CLUSTERED], "argument --batch-size: must be a whole number of at least 1, got 0"),
        (["--seconds-per-iteration", "-1", *CLUSTERED], "--seconds-per-iteration: must be a positive number, got -1"),
        (["--seconds-per-iteration", "1", "--tflops", "1", *CLUSTERED], "both say how long an iteration computes"),
        (["--probe", "2", *CLUSTERED], "argument --probe: must be 0 or at least 3"),
        (
            ["--model", f"{__name__}:tiny_model", "--input", "3x8x8", "--probe", "9", "--methods", "half", *CLUSTERED],
            "--probe and --data are for models that take 3x32x32 images",
        ),
        (["--threads", "9999", *CLUSTERED], f"argument --threads: must be at most {usable_cores()}, the cores at hand"),
        (["--examples", "--model", "resnet32"], "--examples asks questions of its own: --model can't go with it"),
        (["--also", "nothing", *CLUSTERED], "`also` has 'nothing', which matches none of the "),
        (["--also", "fc.weight", "--methods", "half", *CLUSTERED], "--also is for gradiveq, which leaves most layers"),
        (["--validate", "--hosts", "9"], "argument --hosts: must be numbers of hosts from 2 to 6, got 9"),
        (["--validate", "--models", "vgg"], "argument --models: must be of resnet32, "),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert advise.main(arguments) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert said in captured
    assert captured.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", "can't be imported: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("raise RuntimeError('one\\ntwo')", "can't be imported: RuntimeError: one"),
        ("import sys; sys.exit(4)", "can't be imported: SystemExit: 4"),
        ("def f(): raise AssertionError", ": f() failed: AssertionError"),
    ],
)
def test_a_model_whose_module_fails_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    assert advise.main(["--model", "broken:f", "--input", "3x8x8", *CLUSTERED]) == 2
    assert capsys.readouterr().err.rstrip("\n").endswith(said)


# --- validation ------------------------------------------------------------------------------------------------------


def test_a_validation_of_what_the_model_says_has_no_error() -> None:
    """Times that are as predicted: the fit finds the links, every verdict agrees."""
    truth = ClusterFit({"add": 1e10}, 2)
    truth.parameters = (0.9, 500.0, 800.0)
    jobs = []
    for hosts, rate_mbps in ((2, 100), (4, 1000)):
        situation = made_situation(half=made_cost(2 * ELEMENTS, 0.002, 0.001))
        situation.cluster = truth.cluster(hosts, rate_mbps)
        found = Found()
        network = situation.network(situation.cluster.link.bandwidth_gbps)
        for sent in (SentBytes("all_reduce", 262_144), SentBytes("all_gather", 131_072)):
            load = network.load(sent)
            found.collectives.append((sent, [load.seconds] * 3, load.busy_s))
        measured = MeasuredCosts(situation.profile, (ELEMENTS,), (0.02,), (0.0,), situation.costs, {})
        found.models["made"] = measured
        found.cpu_s["made"] = {name: situation.processor_s(name) for name in situation.costs}
        found.times_s["made"] = {name: [situation.predict(name).time_s] * 3 for name in situation.costs}
        jobs.append(Job(hosts, rate_mbps, found))
    fit = ClusterFit({"add": 1e10}, 2)
    fit.fit(jobs)
    assert fit.parameters[0] == pytest.approx(0.9, rel=0.05)
    rows = compare(jobs, fit)
    verdict = judge(rows)
    assert len(rows) == 4
    assert verdict["mean_error"] < 0.05
    assert verdict["agreeing"] == verdict["judged"] == 2
    assert max(verdict["advised_costs"]) == 0
    rows[0]["error"] = math.expm1(1.0)
    assert judge(rows)["mean_error"] == pytest.approx(math.expm1(0.25), rel=0.2)
    assert judge(rows)["worst"] is rows[0]
    about = {"cpu": "a processor", "cores": 2, "load_before": 0.1, "commit": None, "command": "this"}
    assert "another verdict" not in advise_validation.report(rows, verdict, fit, about)
    assert advise_validation.draw(rows, verdict, about).axes
