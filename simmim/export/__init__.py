"""Export of encoders and heads, import of third-party checkpoints."""
