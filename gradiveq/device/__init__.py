"""Methods on a device, as torch operations: kernels, random bits and packed codes, copies to the host.

NEVER RUN ON A GPU. All of it is tested on CPU tensors, and on torch's meta device under a mode that refuses what would
wait. `tests/gpu/test_gpu.py` is ready for a card.

**Bits.** A compressor's torch form (in its own file, beside NumPy's) gives the payload that the other gives, and
decodes it alike, bit by bit; but for norms that are sums. Largest magnitudes are exact. Sums (of squares, magnitudes,
differences) are in float64 as in `gradiveq.arrays.reductions`, but in the device's order instead of 16 lanes one after
another, which would leave most of a GPU idle. Two orders of n numbers of one sign differ by less than n·2^-52 of the
sum, so that QSGD's "l2" norm and the scale of signs are the same float32, or for n < 2^28 the one beside it. The scale
travels with the payload, so that all ranks decode the same.

Payloads may come from ranks without a GPU, and go there. To check them would be to wait. Where a payload's size depends
on the data (threshold, adaptive, AdaComp), the host has to know it before it can send anything: these have no torch
form, gradients go by way of the host, and `gradiveq.ddp.State` warns of it.
"""
