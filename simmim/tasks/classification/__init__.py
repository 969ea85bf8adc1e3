"""Fine-tuning for image classification."""
