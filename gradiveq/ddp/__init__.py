"""Compressed gradients in PyTorch's DistributedDataParallel: a communication hook and its state.

    model = DistributedDataParallel(net)
    state = gradiveq.ddp.State(model, GradiVeQ(ratio=8, fit_slices="all"))
    model.register_comm_hook(state, gradiveq.ddp.hook)

    method                          collectives of a bucket                 on a GPU
    ------------------------------  --------------------------------------  --------------------------------
    Plain                           all_reduce                              stays there
    GradiVeQ                        all_reduce                              stays there; samples of the mean gradient
                                                                            are copied to the host, where PCA is done
    compressors of a fixed size     all_reduce, one for each type, or       stays there; random k's indices are drawn
                                    all_gather                              on the host
    threshold, adaptive, adacomp    all_gather, twice: sizes first          by way of the host
    PowerSGD                        all_reduce, twice                       stays there
    QSGDRing, Accordion, ...        none; the error says why

(On a GPU nothing of this has been run yet; `tests/gpu/test_gpu.py` is ready. Over NCCL nothing that stays there waits
for the device before the next iteration, but once in a window of GradiVeQ's, when its bases are copied there. Gloo copies a
GPU's tensors to the host by itself; its futures know of no streams, so train on the default stream then.)

Conventions are those of PyTorch's own hooks. The hook returns before communication ends, `process_group=None` is the
default group, the first `start_iteration` iterations are not compressed, and `fp16_compress_wrapper(hook)` works.

GradiVeQ samples uncompressed here (`GradiVeQ.sampling` is of the ring). It compresses the weights of 1-D, 2-D and 3-D
convolutions. Transposed and grouped ones, and what is no convolution, go uncompressed unless `State(also=...)` names
them: see `gradiveq.ddp.layers.compressible_layers`.
"""
# No `from __future__ import annotations`: DDP compares the annotations of hooks with the types themselves.

import torch
import torch.distributed as dist

from gradiveq.ddp.probing import Probe, probe
from gradiveq.ddp.state import CompressionStats, State
from gradiveq.ddp.trials import LayerReport

__all__ = ["CompressionStats", "LayerReport", "Probe", "State", "hook", "probe"]


def hook(state: State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """The communication hook: replace a bucket of gradients by its mean over the workers, compressed.

    Args:
        state: one for each wrapped model.
        bucket: from DDP.
    Returns:
        The bucket's tensor, once the exchange is over; its errors name layers and ranks.
    """
    # `backward()` may be called under autocast, which would take products of 16 bits here, and none on the threads of a
    # backend, so that ranks would decode the same payload differently.
    with torch.autocast(bucket.buffer().device.type, enabled=False):
        return state.on_bucket(bucket)
