"""What is asked of a process group: sums and gathers that return at once, and small blocking ones between iterations.

All ranks of a group issue the same collectives in the same order, from the thread that runs backward. Nothing is ever
issued from a callback, or waited for in one: callbacks run on the backend's own threads (Gloo has two), in an order
that differs by rank, and Gloo matches messages by the order in which they were issued. (PyTorch's PowerSGD hook waits
for its second all-reduce in the callback of the first. Over Gloo, with two buckets under way, it has been seen to
stand still for ever, each of the two threads waiting for what only the other could have done; torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from gradiveq.exchange.kernels import HOST


class ProcessGroup:
    """A process group of `torch.distributed` as the hook uses it.

    Args:
        process_group: None for the default one, as everywhere in PyTorch.
        device: of the model. Over NCCL small tensors are there too, as the current device may be another process's; it
            is taken if this is None, or if the model is still on the CPU.
    Raises:
        RuntimeError: there is none yet.

    Attributes:
        rank, size: in the group.
        device: where tensors of small collectives must be.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch.distributed.init_process_group must be called before gradiveq.ddp.State is made")
        group = dist.group.WORLD if process_group is None else process_group
        assert group is not None
        self.process_group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process isn't in `process_group`: only its members train the model")
        # Such as "cpu:gloo,cuda:nccl", which is what `init_process_group()` without a backend makes.
        on_cpu = any(backend.startswith("cpu:") for backend in dist.get_backend_config(group).split(","))
        if on_cpu:
            self.device = torch.device("cpu")
        elif device is not None and device.type == "cuda":
            self.device = device
        else:
            self.device = torch.device("cuda", torch.cuda.current_device())

    @contextmanager
    def exchange(self, what: str, iteration: int) -> Iterator[None]:
        """Within, nothing but a collective is waited for.

        Raises:
            RuntimeError: it failed; says what, where and when.
        """
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"{what} failed on rank {self.rank} in iteration {iteration}: a worker is gone, or didn't answer "
                f"within the process group's timeout ({error})"
            ) from error

    def all_reduce(self, tensor: Tensor) -> Future[Any]:
        """Begin to replace a tensor by its sum over the ranks, in place."""
        return _future(dist.all_reduce(tensor, group=self.process_group, async_op=True))

    def all_gather(self, tensor: Tensor) -> tuple[Tensor, Future[Any]]:
        """Begin to gather everybody's tensor, of the same length on all.

        Returns:
            (shape (size, length), by rank, once the future is done; the future).
        """
        out = torch.empty(self.size, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        work = dist.all_gather(list(out.unbind()), tensor, group=self.process_group, async_op=True)
        return out, _future(work)

    def sum_of(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The sum over the ranks, of any type that the backend adds. Blocks."""
        tensor = HOST.tensor(values.copy()).to(self.device)
        dist.all_reduce(tensor, group=self.process_group)
        total: npt.NDArray[Any] = HOST.array(tensor)
        return total

    def rows_of(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Everybody's whole numbers, (size, length), by rank. Blocks."""
        out, future = self.all_gather(torch.from_numpy(values.copy()).to(self.device))
        future.wait()
        return out.cpu().numpy()

    def objects_of(self, value: object) -> list[Any]:
        """Everybody's picklable object, by rank. Blocks; for errors only."""
        values: list[Any] = [None] * self.size
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def broadcast(self, parts: list[npt.NDArray[np.float32]]) -> None:
        """Give everybody each rank's part: parts[r] comes from rank r and is overwritten on the others. Blocks."""
        tensors = [torch.from_numpy(part).to(self.device) for part in parts]
        works = [
            dist.broadcast(tensor, dist.get_global_rank(self.process_group, r), self.process_group, async_op=True)
            for r, tensor in enumerate(tensors)
            if tensor.numel()
        ]
        for work in works:
            assert work is not None
            work.wait()
        for part, tensor in zip(parts, tensors, strict=True):
            part[:] = tensor.cpu().numpy()


def _future(work: Any) -> Future[Any]:
    future: Future[Any] = work.get_future()
    return future
