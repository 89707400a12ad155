"""Training: the loop, the training step, the dry run, and the training of a pose estimator."""
