"""Images into shards that training streams from."""
