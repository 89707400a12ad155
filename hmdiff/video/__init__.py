"""People in videos: reading, tracking, recovery with temporally consistent hypotheses, smoothing, drawing."""
