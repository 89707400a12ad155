"""Option values and metric titles, without importing torch, so that `hmdiff --help` is fast."""

from __future__ import annotations

# Splits of the synthetic people.
SPLITS = ("test", "test_occluded", "test_guessed", "test_ood", "test_postures", "val", "calibration")
METRICS = {"pve": "PVE", "mpjpe": "MPJPE", "pa_mpjpe": "PA-MPJPE", "pa_pve": "PA-PVE"}
SAMPLERS = ("ddim", "ddpm", "dpm++", "sde-dpm++", "unipc", "euler", "heun")  # a test compares with diffusion.schedule
SAVED = ("npz", "glb", "obj", "png", "html")  # file types saved per person
