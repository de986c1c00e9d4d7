"""The compressors of `gradiveq.compressors` on buckets: sums in an all-reduce, the others in an all-gather.

    sums       | payloads of one type, part after part | codes |             one message for each type
    gathered   | code | payloads, part after part |                          one message for each rank

Where the size of payloads depends on the data, a first round tells everybody's, and messages are padded to the longest.
Codes (`gradiveq.ddp.flaws`) travel once: in the gathered message, with the sizes, or in the first sum.

Compressors are NumPy and numba: of a bucket on a GPU the gradient is copied to the host, which waits for it, and the
mean back; unless all of the bucket is for those of `gradiveq.ddp.native`, and the master's compressor is one of them:
then all of it stays on the GPU (`gradiveq.ddp.native_rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradiveq.compressors.base import Array, Compressor, Float32
from gradiveq.ddp.bucket import Plan
from gradiveq.ddp.flaws import CODE_BYTES, OVERFLOWED, any_flaw, flaw
from gradiveq.ddp.memory import Memories, Memory, summed
from gradiveq.ddp.native import is_native
from gradiveq.ddp.native_rounds import native_rounds
from gradiveq.ddp.part import BucketPart
from gradiveq.ddp.scheme import Round, Rounds, Scheme, Traffic, Work
from gradiveq.ddp.wire import Sums, array_of, seen, tensor_of
from gradiveq.message import pack, unpack
from gradiveq.methods import Compressed


class CompressorScheme(Scheme):
    """A `Compressed` method.

    Args:
        chosen: the compressor of each parameter, by index; None to compress each bucket as one.
        seed: of random numbers.
    """

    def __init__(self, method: Compressed, chosen: Sequence[Compressor] | None, seed: int) -> None:
        self.method, self.seed = method, seed
        self._chosen = chosen
        self._memory = None if method.feedback is None else Memory()

    def rounds(self, work: Work) -> Rounds:
        parts = self._parts(work.plan, work.index)
        master = self.method.master
        used = [part.compressor for part in parts] + ([] if master is None else [master])
        if self.on_device(work) and all(map(is_native, used)):
            return native_rounds(work, parts, self._memory, master, self.seed)
        work.code = int(work.code)
        values, latest = self._corrected(work)
        payloads = []
        left = None if self._memory is None else np.empty_like(values)
        for part in parts:
            draw = part.draw(self.seed, work)
            payload = part.compressor.compress(
                values[part.where], draw, latest[part.where] if part.compressor.uses_latest else None
            )
            payloads.append(array_of(seen(tensor_of(payload), work)) if part.summed else payload)
            if left is not None:
                part.compressor.decompress(payloads[-1], left[part.where], draw)
        if left is not None and self._memory is not None:
            np.subtract(values, left, out=left)
            self._memory.stage(work.plan, torch.from_numpy(left))
        return self._exchange(work, parts, payloads)

    def begin(self, iteration: int, traffic: Traffic) -> None:
        if self._memory is not None:
            self._memory.forget()

    @staticmethod
    def on_device(work: Work) -> bool:
        """Whether the gradient should stay where it is."""
        return work.buffer.is_cuda

    def end(self, compressed: bool) -> None:
        if self._memory is not None and compressed:
            self._memory.commit()

    def state_dict(self) -> dict[str, Any]:
        return {"memory": None if self._memory is None else self._memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._memory is not None:
            self._memory.load_state_dict(state["memory"])

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        if self._memory is not None:
            self._memory.load_state_dict(summed([state["memory"] for state in states], rank, size, memories))

    def _parts(self, plan: Plan, bucket: int) -> list[BucketPart]:
        if self._chosen is None:
            return [BucketPart(plan.title(), bucket, 0, plan.length, self.method.compressor)]
        return [
            BucketPart(place.name, place.index, place.start, place.stop, self._chosen[place.index])
            for place in plan.places
        ]

    def _corrected(self, work: Work) -> tuple[Float32, Float32]:
        """What is to be compressed, and what of it is new."""
        latest: Float32 = work.gradient().cpu().numpy()
        if self._memory is None:
            return latest, latest
        memory = self._memory.of(work.plan, torch.device("cpu")).numpy()
        with np.errstate(over="ignore"):
            corrected = latest + memory
        if not np.isfinite(corrected).all():
            worst = next(p for p in work.plan.places if not np.isfinite(corrected[p.start : p.stop]).all())
            work.code = flaw(OVERFLOWED, worst.index)
        return (np.zeros_like(latest), latest) if int(work.code) > 1 else (corrected, latest)

    def _exchange(self, work: Work, parts: Sequence[BucketPart], payloads: Sequence[Array]) -> Rounds:
        assert isinstance(work.code, int)
        sums = Sums(work, {i: tensor_of(payloads[i]) for i, part in enumerate(parts) if part.summed})
        futures = sums.begin()

        gathering = [i for i, part in enumerate(parts) if not part.summed]
        compressors = [parts[i].compressor for i in gathering]
        own = pack([payloads[i] for i in gathering], [parts[i] for i in gathering])
        rows: list[Array] = []
        if not gathering:
            yield Round(futures, last=True)
            sums.hear()
        elif all(compressor.fixed_size for compressor in compressors):
            message = np.concatenate([np.array([work.code], np.int64).view(np.uint8), own])
            everybody, future = work.all_gather(torch.from_numpy(message).to(work.group.device))
            yield Round([*futures, future], last=True)
            gathered = everybody.cpu().numpy()
            work.heard = torch.from_numpy(np.frombuffer(gathered[:, :CODE_BYTES].tobytes(), np.int64).copy())
            rows = list(gathered[:, CODE_BYTES:])
        else:
            said, future = work.all_gather(torch.tensor([work.code, len(own)], device=work.group.device))
            yield Round([future], last=False)
            work.heard, lengths = said[:, 0].cpu(), said[:, 1].tolist()
            if any_flaw(work.heard):
                yield Round(futures, last=True)
                return
            padded = np.pad(own, (0, max(lengths) - len(own)))
            everybody, future = work.all_gather(torch.from_numpy(padded).to(work.group.device))
            yield Round([*futures, future], last=True)
            rows = [row[:length] for row, length in zip(everybody.cpu().numpy(), lengths, strict=True)]
        out = np.zeros(work.plan.length, np.float32)
        for i, total in sums.totals(torch.device("cpu")):
            part, draw = parts[i], parts[i].draw(self.seed, work)
            part.compressor.decompress(array_of(total), out[part.where], draw, work.group.size)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for by the State, on all ranks alike
            self._add_gathered(work, [parts[i] for i in gathering], rows, out)
            for part in parts:
                part.compressor.finish(out[part.where], work.group.size)
            self._send_back(work, parts, out)
        work.write(torch.from_numpy(out).to(work.buffer.device))

    def _add_gathered(self, work: Work, parts: Sequence[BucketPart], rows: Sequence[Array], out: Float32) -> None:
        scratch = np.empty(max((part.length for part in parts), default=0), np.float32)
        for rank, message in enumerate(rows):
            for part, payload in zip(parts, unpack(message, parts, rank), strict=True):
                draw = part.draw(self.seed, work, rank)
                part.compressor.add_to(payload, out[part.where], draw, scratch[: part.length])

    def _send_back(self, work: Work, parts: Sequence[BucketPart], mean: Float32) -> None:
        """What Algorithm 1's master sends back of the mean: every rank has the mean, and compresses it alike."""
        master = self.method.master
        if master is None or not np.isfinite(mean).all():
            return
        for part in parts:
            draw = part.master_draw(self.seed, work)
            values = mean[part.where].copy()
            master.decompress(master.compress(values, draw, values), mean[part.where], draw)
