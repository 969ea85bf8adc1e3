"""Checkpoints: what is saved, how and when, which are kept, and the running average."""
