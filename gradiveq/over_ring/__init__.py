"""Gradients over this project's ring: the driver, its codecs, and the aggregator for any training loop.

Nothing else in `gradiveq` needs the package `ring`.
"""
