"""Visual output: renderings, overlays, sheets, and files for viewers."""
