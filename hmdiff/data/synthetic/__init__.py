"""Synthetic people: poses, appearance, occluders, cameras, and corruptions as of 2D pose and depth estimators."""
