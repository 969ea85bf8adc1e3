"""The jobs that run on the training loop, a file each."""
