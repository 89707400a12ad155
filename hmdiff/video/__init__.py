"""People in videos: read, tracked, recovered with hypotheses that agree over time, smoothed, drawn."""
