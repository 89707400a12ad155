"""Depth maps of photos: files, callables and monocular networks behind one interface."""
