"""Faster kernels of attention, linear layers and relative positions; dispatch.py chooses."""
