"""The communication hook in DistributedDataParallel, on the ranks of the default process group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import gradiveq.ddp as ddp

from .adapters import probed
from .cases import Case
from .in_process import probe_rows
from .inputs import FLAWED, Model, gradients
from .traces import Trace, digest, flat, key_names, plain

WRAPPERS = {
    None: lambda hook: hook,
    "fp16": default_hooks.fp16_compress_wrapper,
}
#: Fits several buckets; a large one fits all.
BUCKET_CAP_MB = 0.003


def wrap(options: dict[str, Any]) -> DistributedDataParallel:
    model = Model().to(getattr(torch, options.pop("dtype", "float32")))
    if options.pop("channels_last", False):
        for parameter in (model.conv1.weight, model.conv2.weight):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return DistributedDataParallel(
        model,
        bucket_cap_mb=options.pop("bucket_cap_mb", BUCKET_CAP_MB),
        find_unused_parameters=options.get("unused", False),
    )


class Run:
    """A wrapped model and its state."""

    def __init__(self, case: Case) -> None:
        options = dict(case.options)
        wrapper = WRAPPERS[options.pop("wrapper", None)]
        self.model = wrap(options)
        self.unused = options.pop("unused", False)
        self.factor = 1.0
        self.scaled = options.pop("loss_scale", False)
        method: Any = case.make()
        self.state = ddp.State(
            self.model,
            method,
            seed=5,
            nonfinite="propagate",
            loss_scale=(lambda: self.factor) if self.scaled else None,
            **options,
        )
        self.model.register_comm_hook(self.state, wrapper(ddp.hook))

    def advance(self, iteration: int, trace: Trace | None) -> None:
        size, net = dist.get_world_size(), self.model.module
        if self.scaled:
            self.factor = float(2 ** (iteration % 3))
        given = gradients(net, dist.get_rank(), size, iteration, unused=self.unused, flawed=FLAWED)
        before = self.state.compression_stats()
        phase = self.state.phase
        for parameter in net.parameters():
            parameter.grad = None
        self.model(given, self.factor).backward()
        if trace is None:
            return
        after = self.state.compression_stats()
        found: list[Tensor | None] = [
            None if parameter.grad is None else parameter.grad / self.factor for parameter in net.parameters()
        ]
        row = {
            "phase": phase,
            "bytes_before": after.bytes_before - before.bytes_before,
            "bytes_after": after.bytes_after - before.bytes_after,
            "compress_rate": after.compress_rate,
        }
        trace.add(flat(found, net), row)


def hook_case(title: str, case: Case) -> dict[str, Any]:
    """One run, and from a kept state again."""
    run = Run(case)
    trace = Trace(sum(parameter.numel() for parameter in run.model.parameters()))
    kept, names = {}, set()
    for iteration in range(case.iterations):
        if iteration in case.resume:
            kept[iteration] = run.state.state_dict(), trace.copy()
            names |= key_names(kept[iteration][0])
        run.advance(iteration, trace)
    log = repr(plain(run.state.window_log))
    for start, (state, resumed) in kept.items():
        other = Run(case)
        other.advance(0, None)  # DDP has other buckets in its first iteration
        other.state.load_state_dict(state)
        for iteration in range(start, case.iterations):
            other.advance(iteration, resumed)
        assert resumed.fingerprint == trace.fingerprint, f"{title}: resumed after {start} iterations, it isn't the same"
        assert repr(plain(other.state.window_log)) == log, f"{title}: the log of a resumed run isn't the same"
    result = trace.result()
    everybody = gathered([result["weights"], result["means"], repr(result["reports"])])
    assert len({tuple(one[:2]) for one in everybody}) == 1, f"{title}: the ranks differ"
    return {
        **result,
        "log": digest(log.encode()),
        "all_ranks": digest(*(one[2].encode() for one in everybody)),
        "state": sorted(names),
    }


def gathered(values: list[str]) -> list[list[str]]:
    """By rank."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, values)
    return everybody


def probe_case(methods: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapped model, whose hook the probe is."""
    model = wrap({})
    found, trace = probed(model, methods), Trace(sum(parameter.numel() for parameter in model.parameters()))
    for iteration in range(9):
        given = gradients(model.module, dist.get_rank(), dist.get_world_size(), iteration, unused=False, flawed=FLAWED)
        model.zero_grad()
        model(given, 1.0).backward()
        trace.add(flat([parameter.grad for parameter in model.parameters()], model), {"iteration": iteration})
    return {**probe_rows(found), **trace.result()}
