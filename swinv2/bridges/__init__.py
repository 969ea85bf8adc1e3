"""Bridges between the encoder and other libraries, a file for each format."""
