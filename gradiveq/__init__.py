"""Compression of gradients on their way around the ring: GradiVeQ (Yu et al. 2018) and QSGD (Alistarh et al. 2017)."""
