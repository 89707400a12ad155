"""What looks at photos: pose estimators and detectors (mmpose), depth networks (transformers)."""
