"""Loops over float32 vectors, compiled with Numba: selection, packed codes and signs, sums, random numbers."""
