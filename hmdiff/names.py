"""Names that need no torch, so that `hmdiff --help` is quick: what options may be called, and the titles of metrics."""

from __future__ import annotations

# Of synthetic people.
SPLITS = ("test", "test_occluded", "test_guessed", "test_ood", "test_postures", "val", "calibration")
METRICS = {"pve": "PVE", "mpjpe": "MPJPE", "pa_mpjpe": "PA-MPJPE", "pa_pve": "PA-PVE"}
SAMPLERS = ("ddim", "ddpm", "dpm++", "sde-dpm++", "unipc", "euler", "heun")  # a test holds them to diffusion.schedule
SAVED = ("npz", "glb", "obj", "png", "html")  # kinds of files of a person
