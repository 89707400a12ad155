"""Files: where the shipped ones lie, writing without leaving halves, and reading without running what is read."""
