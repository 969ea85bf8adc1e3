"""Attention, linear products and tables of relative positions, one fast way per device."""
