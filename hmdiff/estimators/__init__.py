"""Networks for photos: pose estimators and detectors (mmpose), depth networks (transformers)."""
