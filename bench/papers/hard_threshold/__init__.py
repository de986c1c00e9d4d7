"""Hard-threshold against top-k with error feedback (Sahu et al. 2021)."""
