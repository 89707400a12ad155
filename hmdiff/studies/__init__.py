"""Comparisons: sweeps over settings, tables of checkpoints, and tables of models that are trained for them."""
