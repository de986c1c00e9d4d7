"""Layer-wise against entire-model compression (Dutta et al. 2020)."""
