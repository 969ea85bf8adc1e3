"""Fine-tuning for semantic segmentation."""
