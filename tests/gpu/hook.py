"""The hook on a device beside the hook on the CPU, of the same weights and images: a torchrun job of `test_gpu`.

    torchrun --nproc-per-node RANKS -m tests.gpu.hook BACKEND DEVICE

All ranks share the device. NCCL takes one rank; Gloo copies a GPU's tensors to the host by itself.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gradiveq import GradiVeQ, Plain
from gradiveq.compressors.base import Draw
from gradiveq.compressors.half import Half
from gradiveq.compressors.randomk import RandomK
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.methods import Compressed
from gradiveq.powersgd import PowerSGD
from gradiveq.specs import parse
from tests.support.ddp_harness import Net, batch, gradients, hooked, same_everywhere
from tests.support.native_methods import METHODS as NATIVE
from tests.support.native_methods import PALETTES, SPECS, check_bits

ITERATIONS = 12
START = 2
#: Five samples of a slice have four directions, and all are kept: no two nearly equal eigenvalues are told apart.
GRADIVEQ = GradiVeQ(warmup=0, sample=5, compress=4, n_components=4, holdout_every=2)
#: ‖on the device - on the CPU‖ / ‖on the CPU‖ of a mean gradient: products and sums are in another order there. Of two
#: elements that are equal within that, top-k may take the other one, and remember accordingly.
METHODS: dict[str, tuple[Any, float]] = {
    "plain": (Plain(), 1e-5),
    "gradiveq": (GRADIVEQ, 1e-3),
    "gradiveq, voting": (replace(GRADIVEQ, compress="auto"), 1e-3),
    "half with error feedback": (Compressed(Half(), feedback=ErrorFeedback()), 1e-3),
    "random k": (RandomK(ratio=0.2), 1e-5),
    "integers": (parse("integer:rounding=stochastic+ef"), 1e-3),
    "top-k with error feedback": (Compressed(TopK(ratio=0.1), feedback=ErrorFeedback()), 5e-2),
    "fine QSGD with error feedback": (parse("qsgd-gather:65536:norm=max+ef"), 1e-3),
    "several compressors": (parse("topk:0.1/*.bias=identity/fc.weight=half+ef"), 5e-2),
    "PowerSGD": (PowerSGD(2), 1e-3),
}
#: Of what stays on the device, nothing may wait for it while it compresses.
UNWAITING: dict[str, Any] = {
    name: METHODS[name][0] for name in ("plain", "gradiveq", "PowerSGD", "several compressors")
} | {
    name: method
    for name, method in NATIVE.items()
    if not method.overrides  # these name other layers
}


def backward(model: Any, iteration: int, device: torch.device) -> None:
    x, y = batch(iteration)
    model.zero_grad()
    F.cross_entropy(model(x.to(device)), y.to(device)).backward()


def compare(name: str, device: torch.device, cpu_group: Any) -> None:
    """Every iteration begins with the same weights on both, so that nothing drifts apart but what the hook keeps."""
    method, tolerance = METHODS[name]
    theirs, ours = Net(), Net().to(device)
    reference, _ = hooked(theirs, method, wrapping={"process_group": cpu_group})
    model, state = hooked(ours, method)
    for iteration in range(ITERATIONS):
        ours.load_state_dict(theirs.state_dict())
        phase = state.phase
        backward(reference, iteration, torch.device("cpu"))
        backward(model, iteration, device)
        expected, got = gradients(reference), gradients(model)
        same_everywhere(got, f"{name}: the means of iteration {iteration}")
        off = float((got.cpu() - expected).norm() / expected.norm())
        assert off <= tolerance, f"{name}: off by {off} in iteration {iteration} ({phase}), {tolerance} are allowed"
        with torch.no_grad():
            for p in theirs.parameters():
                assert p.grad is not None
                p -= 0.05 * p.grad


def same_bits(device: torch.device) -> None:
    """Of every compressor: of denormals too, and of quotients that a reciprocal wouldn't give."""
    for spec in SPECS:
        for length in (1, 513, 5000):
            generator = np.random.default_rng(length)
            vectors = [generator.choice(np.array(palette, np.float32), length) for palette in PALETTES.values()]
            for values in (*vectors, generator.standard_normal(length).astype(np.float32)):
                check_bits(spec, values, Draw(1, 2, 3, length), device)


def waits(name: str, device: torch.device) -> str | None:
    """Where a backward pass waits for the device while compressing; None if it does not."""
    method = UNWAITING[name]
    if isinstance(method, GradiVeQ):
        method = replace(method, holdout_every=0)  # to measure is to look
    model, state = hooked(Net().to(device), method)
    for iteration in range(START + 7):
        backward(model, iteration, device)
    assert name != "gradiveq" or state.phase == "compress"
    x, y = (one.to(device) for one in batch(0))
    loss = F.cross_entropy(model(x), y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def main(arguments: Sequence[str]) -> None:
    backend, device = arguments[0], torch.device(arguments[1])
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    cpu_group = dist.new_group(backend="gloo")
    same_bits(device)
    for name in METHODS:
        compare(name, device, cpu_group)
    if backend == "nccl":  # Gloo waits by itself
        for name in UNWAITING:
            where = waits(name, device)
            assert where is None, f"{name} waits: {where}"
    if dist.get_rank() == 0:
        print("all as on the CPU", flush=True)
    # NCCL's guesses a device otherwise, and warns; Gloo's takes none.
    dist.barrier(device_ids=[device.index] if backend == "nccl" else None)
    os._exit(0)  # as in `ddp_harness`


if __name__ == "__main__":
    main(sys.argv[1:])
