"""Families of methods as generators of requests (`requests`, `family`), and what they share.

direct        uncompressed, QSGD at every hop            parts          what a compressor is applied to at once
compressed    compressors, summed or gathered            error_memory   what was left out, for the next gradient
lowrank       PowerSGD                                   flaws          why a worker's gradient is of no use
windows       GradiVeQ                                   message        payloads of an all-gather in one message
switching     ACCORDION, a threshold by a formula        kernels        array operations of the host
"""
