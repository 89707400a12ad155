"""What people look at: renderings, overlays, sheets, and files for viewers."""
