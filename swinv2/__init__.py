"""Swin Transformer V2: the encoder, its weights and its bridges to other libraries."""
