"""The shard format: manifest, index, statistics, tars, storage, atomic writes."""
