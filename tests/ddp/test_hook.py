"""The communication hook under torchrun, on 2 and 4 ranks over Gloo, and its parts that need no process group.

Each number of ranks is one job in which all of `checks` follow each other; here each is a test.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradiveq.compressors.topk import TopK
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.ddp.state import State
from gradiveq.exchange.error_memory import ByName, summed
from gradiveq.exchange.flaws import NOT_FINITE, REPLACED, UNKNOWN, Codes, any_flaw, flaw, is_hard, story, votes
from gradiveq.flatten import Block, Bucket
from gradiveq.over_ring.pca_codec import PCACodec
from gradiveq.pca import PCAConfig, PCASampler
from gradiveq.pca.coding import Bases
from gradiveq.pca.loss import Loss
from gradiveq.pca.projection import Projection, squares
from ring.codec import Hop
from tests.ddp.checks import CHECKS
from tests.support.ddp_harness import Net
from tests.support.processes import TORCHRUN, environment

pytestmark = pytest.mark.slow

DEADLINE_S = 240


@pytest.fixture(scope="session", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each check, and what the job printed."""
    folder = tmp_path_factory.mktemp("ddp")
    out = folder / "checks.jsonl"
    command = [
        str(TORCHRUN),
        "--standalone",
        "--nproc-per-node",
        str(request.param),
        "-m",
        "tests.ddp.checks",
        str(out),
    ]
    with (folder / "printed").open("w+") as printed:
        process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=printed, stderr=subprocess.STDOUT)
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            process.wait(30)
        printed.seek(0)
        text = printed.read()
    results = (
        {line["name"]: line["error"] for line in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    )
    return {"results": results, "printed": text, "code": process.returncode}


@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("name", list(CHECKS))
def test_on_all_ranks(job: dict[str, Any], name: str) -> None:
    assert name in job["results"], f"the job ended before this check: {job['printed'][-3000:]}"
    assert job["results"][name] is None, job["results"][name]


@pytest.mark.timeout(DEADLINE_S + 60)
def test_jobs_end_well(job: dict[str, Any]) -> None:
    assert job["code"] == 0, job["printed"][-3000:]


@pytest.mark.timeout(DEADLINE_S + 60)
def test_a_rank_that_dies_or_falls_silent(tmp_path: Path) -> None:
    """The other one is told in which exchange, within the process group's timeout."""
    cases = [("powersgd", "dies"), ("topk", "sleeps"), ("gradiveq", "dies")]
    jobs = []
    for method, fate in cases:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "tests.ddp.checks.dying", method, fate]
        jobs.append(
            [
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=environment(RANK=str(rank), **common),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank in range(2)
            ]
        )
    try:
        for (method, fate), (survivor, _) in zip(cases, jobs, strict=True):
            said, _ = survivor.communicate(timeout=DEADLINE_S)
            assert survivor.returncode == 3, (method, fate, said)
            assert "iteration 4: " in said
            assert "failed on rank 0 in iteration 4" in said
            assert "a worker is gone, or didn't answer" in said
            assert f"the exchange of {'bases of conv1.weight' if method == 'gradiveq' else 'fc'}" in said
    finally:
        for pair in jobs:
            for process in pair:
                process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32])
def test_codes_survive_a_sum_in_every_type(dtype: torch.dtype) -> None:
    codes = Codes(size=5, num_parameters=12_345)
    own = [0, 1, flaw(NOT_FINITE, 0), flaw(UNKNOWN, 12_344) + 1, flaw(REPLACED, 77)]
    total = torch.zeros(codes.length, dtype=dtype)
    for rank, code in enumerate(own):
        tail = torch.full((codes.length,), 3, dtype=dtype)
        codes.write(tail, rank, code if rank % 2 else torch.tensor(code))
        total += tail
    heard = codes.read(total)
    assert heard.tolist() == own
    assert any_flaw(heard)
    assert not any_flaw(heard[:2])
    assert votes(heard) == 2
    names = [f"layer{i}" for i in range(12_345)]
    assert [text.split(" on ")[1] for _, text in story(heard.tolist(), names)] == ["rank 2", "rank 3", "rank 4"]
    assert story(heard.tolist(), names)[2][1].startswith("layer77 was replaced")
    assert [is_hard(code) for code in own] == [False, False, False, True, True]


@pytest.mark.parametrize("fit_slices", ["first", "all"])
@pytest.mark.parametrize("reuse", [None, 2])
def test_projection_is_the_codecs(fit_slices: Any, reuse: int | None) -> None:
    """The same payload and the same estimate as the ring's codec, with a last slice that is padded."""
    generator = np.random.default_rng(5)
    block = Block("conv", 0, 210, (7, 30), True)
    config = PCAConfig(slice_size=64, n_components=5, fit_slices=fit_slices, reuse=reuse)
    sampler = PCASampler([block], {"conv": 64}, config, 0, 1)
    for _ in range(9):
        sampler.add(generator.standard_normal(210).astype(np.float32) + 3)
    dims = sampler.fit()
    share, _ = sampler.share(dims)
    (basis,) = sampler.rebuild(dims, [share])
    gradient = generator.standard_normal(210).astype(np.float32) + 3

    codec, projection = PCACodec(basis), Projection(basis, torch.device("cpu"))
    payload = np.empty(sum(region.num_bytes for region in codec.regions(210, np.dtype(np.float32))), np.uint8)
    codec.encode(gradient, 0, payload, Hop(0, 1, 0))
    coded = torch.empty(projection.length)
    projection.encode(torch.from_numpy(gradient), coded)
    np.testing.assert_allclose(coded.numpy(), payload.view(np.float32), rtol=1e-4, atol=1e-5)
    estimate = np.empty(210, np.float32)
    codec.decode(payload, 0, estimate, 1)
    decoded = projection.decode(coded)
    np.testing.assert_allclose(decoded.numpy(), estimate, rtol=1e-4, atol=1e-5)
    loss = Loss(*squares(decoded, torch.from_numpy(gradient)).tolist())
    np.testing.assert_allclose(loss.relative, Loss.between(estimate, gradient).relative, rtol=1e-3)
    of_bases = Bases([basis]).losses_on([block], torch.from_numpy(gradient))["conv"]
    np.testing.assert_allclose(loss.relative, of_bases.relative, rtol=1e-3)


def test_memories_of_other_workers() -> None:
    """The mean of what has been left out is kept, from 6 to 4, to 1 and to 9 workers."""
    states = [{"a": torch.arange(3.0) + rank, "b": torch.full((2, 2), float(rank))} for rank in range(6)]
    mean = {name: sum(state[name] for state in states) / 6 for name in ("a", "b")}
    for size in (1, 4, 9):
        parts = [summed(states, rank, size, "sum") for rank in range(size)]
        for name, expected in mean.items():
            total = sum((part[name] for part in parts if name in part), torch.zeros_like(expected))
            torch.testing.assert_close(total / size, expected)
    assert summed(states, 0, 4, "drop") == {}


def test_memory_follows_its_parameters() -> None:
    def bucket(*names: str) -> Bucket:
        sizes = {"a": 2, "b": 3, "c": 1}
        blocks, start = [], 0
        for name in names:
            blocks.append(Block(name, start, sizes[name], (sizes[name],), False, 0, (1,)))
            start += sizes[name]
        return Bucket(tuple(blocks), start)

    memory, cpu = ByName(), torch.device("cpu")
    first, second = bucket("a", "b"), bucket("c")
    assert memory.of(first, cpu).tolist() == [0] * 5
    memory.stage(first, torch.tensor([1.0, 2, 3, 4, 5]))
    memory.of(second, cpu)
    memory.stage(second, torch.tensor([6.0]))
    memory.commit()
    memory.stage(first, torch.full((5,), 9.0))
    memory.forget()
    memory.commit()
    assert memory.of(bucket("c", "a"), cpu).tolist() == [6, 1, 2]
    assert memory.of(bucket("b"), cpu).tolist() == [3, 4, 5]
    saved = memory.state_dict()
    assert {name: one.tolist() for name, one in saved.items()} == {"a": [1, 2], "b": [3, 4, 5], "c": [6]}
    other = ByName()
    other.load_state_dict(saved)
    assert other.of(bucket("b", "c"), cpu).tolist() == [3, 4, 5, 6]
    assert other.state_dict().keys() == saved.keys()


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_small_collectives_are_on_the_cpu_where_a_backend_takes_them(backend: str | None) -> None:
    """`init_process_group()` makes a group with one backend for CPUs and one for GPUs."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = ProcessGroup(None)
        assert group.device == torch.device("cpu")
        assert group.rows_of(np.array([3, 5])).tolist() == [[3, 5]]
    finally:
        dist.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_small_collectives_are_on_the_models_device_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP needs no `torch.cuda.set_device`: the current device may be cuda:0 in all processes."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert ProcessGroup(None, torch.device("cuda", 3)).device == torch.device("cuda", 3)
    assert ProcessGroup(None, torch.device("cpu")).device == torch.device("cuda", 0)


@pytest.mark.usefixtures("alone")
def test_a_compiled_model_has_the_same_group_and_names() -> None:
    group = dist.new_group([0])
    model = DistributedDataParallel(Net(), process_group=group)
    compiled = torch.compile(model, backend="eager")
    state, other = State(compiled, TopK()), State(torch.compile(Net(), backend="eager"), TopK())
    assert state._group.process_group is group
    expected = State(model, TopK()).state_dict()
    for one in (state, other):
        one.load_state_dict(expected)
        assert one._parameters.names == [name for name, _ in Net().named_parameters()]
