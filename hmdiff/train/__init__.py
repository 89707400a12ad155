"""Training: the loop, one step of it, its check before it starts; and the training of a pose estimator."""
