"""One bucket's exchange by compressors that are all native: on a GPU nothing waits for the device.

What the host would look at becomes part of what is computed: this rank's code, and whether the mean is finite. Messages
are those of `gradiveq.ddp.compressors`, so that the host's form of this exchange can be at the other end.

Tensors that the callback reads are kept in `work.kept`; what it makes itself is used on its own stream alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradiveq.compressors.base import Compressor
from gradiveq.ddp import native
from gradiveq.ddp.flaws import CODE_BYTES, OVERFLOWED, flaw_on_device
from gradiveq.ddp.memory import Memory
from gradiveq.ddp.part import BucketPart
from gradiveq.ddp.scheme import Round, Rounds, Work
from gradiveq.ddp.wire import Sums, seen


def native_rounds(
    work: Work, parts: Sequence[BucketPart], memory: Memory | None, master: Compressor | None, seed: int
) -> Rounds:
    """See the module; all compressors, and the master's, are `native.is_native`."""
    values = work.gradient()
    if memory is not None:
        values = corrected(work, values, memory)
    payloads, left = [], torch.empty_like(values)
    for part in parts:
        draw = part.draw(seed, work)
        payload = native.compress(part.compressor, values[part.where], draw)
        payloads.append(payload)
        if memory is not None:
            payload = seen(payload, work) if part.summed else payload
            native.decompress(part.compressor, payload, left[part.where], draw)
    if memory is not None:
        memory.stage(work.plan, values - left)

    sums = Sums(work, {i: payloads[i] for i, part in enumerate(parts) if part.summed})
    futures = sums.begin()
    gathering = [i for i, part in enumerate(parts) if not part.summed]
    if gathering:
        code = torch.as_tensor(work.code, dtype=torch.int64, device=values.device)
        message = torch.cat([code.view(1).view(torch.uint8), *(payloads[i] for i in gathering)])
        everybody, future = work.all_gather(message)
        work.kept += [message, everybody]
        futures.append(future)
    lengths = [len(payloads[i]) for i in gathering]
    yield Round(futures, last=True)

    out = torch.zeros(work.plan.length, dtype=torch.float32, device=work.buffer.device)
    for i, total in sums.totals(out.device):
        native.decompress(parts[i].compressor, total, out[parts[i].where], parts[i].draw(seed, work))
    if gathering:
        work.heard = everybody[:, :CODE_BYTES].contiguous().view(torch.int64).view(-1)
        for i, rows in zip(gathering, everybody[:, CODE_BYTES:].split_with_sizes(lengths, dim=1), strict=True):
            native.add_to(parts[i].compressor, rows, out[parts[i].where])
    else:
        sums.hear()
    for part in parts:
        native.finish(part.compressor, out[part.where], work.group.size)
    work.write(out if master is None else _sent_back(work, parts, master, seed, out))


def corrected(work: Work, latest: Tensor, memory: Memory) -> Tensor:
    """What is to be compressed: with what is remembered, and zeros where the code says that it is of no use."""
    values = latest + memory.of(work.plan, latest.device)
    code = torch.as_tensor(work.code, device=latest.device)
    worst = flaw_on_device(values, work.plan.places, OVERFLOWED)
    work.code = code = torch.where((code <= 1) & (worst > 0), worst, code)
    return torch.where(code > 1, 0, values)


def _sent_back(work: Work, parts: Sequence[BucketPart], master: Compressor, seed: int, mean: Tensor) -> Tensor:
    """What Algorithm 1's master sends back of the mean, if it is finite."""
    finite = mean.isfinite().all()
    values, estimate = torch.where(finite, mean, 0), torch.empty_like(mean)
    for part in parts:
        draw = part.master_draw(seed, work)
        native.decompress(master, native.compress(master, values[part.where], draw), estimate[part.where], draw)
    return torch.where(finite, estimate, mean)
