"""Loops over arrays on the host that know nothing of methods, compiled with Numba where NumPy would be slow.

reductions    norms and sums in one pass            counter_random    random numbers keyed by position
select        exact top-k and threshold             levels            stochastic rounding to levels of a norm
bits          codes of a fixed width, packed        orthonormal       columns made orthonormal, the same bits everywhere
signs         one bit an element                    float32           the limits of float32
"""
