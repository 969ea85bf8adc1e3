"""Samples in shards, folders, clips, label maps and COCO files."""
