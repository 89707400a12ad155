"""Sweeps, ablations and stress tests on top of `hmdiff.evaluate`: the code that reproduces the papers' tables."""
