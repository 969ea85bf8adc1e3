"""Checkpoints: contents, saving, retention, resuming, and the running average (EMA)."""
