"""Evaluation: metrics, named protocols, evaluation of a split or data set, calibration."""
