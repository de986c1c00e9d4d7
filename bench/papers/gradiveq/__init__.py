"""Figures 2, 4, 5 and 7b of the GradiVeQ paper (Yu et al. 2018)."""
