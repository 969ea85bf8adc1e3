"""The shard format: manifest, index, tars, storage."""
