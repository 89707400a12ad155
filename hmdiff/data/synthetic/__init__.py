"""Synthetic people: poses, looks, occluders, cameras, and the faults of the estimators that look at them."""
