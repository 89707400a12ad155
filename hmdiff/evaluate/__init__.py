"""Evaluation: metrics, named protocols, the runs over a split or a data set, calibration."""
