"""Fine-tuning for object detection and instance segmentation."""
