"""Training: the loop, its checkpoints, processes and monitoring."""
