"""Fine-tuning for video classification."""
