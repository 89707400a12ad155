"""The lab: sweeps, ablations and stress tests, on `hmdiff.evaluate`: what reproduces the papers' tables."""
