"""What segmentation and detection are made of: files, transforms, models, metrics and overlays."""
