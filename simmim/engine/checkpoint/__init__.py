"""Checkpoints: what is saved, how, when, and which are kept."""
