"""The tasks that run on the training loop, a folder for each."""
