"""From shards to batches: order, reading, transforms."""
