"""Described clusters in virtual time: predictions, and the calibration of this machine."""
