"""Probing frozen features with nearest neighbours and a linear classifier."""
