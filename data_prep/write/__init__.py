"""Writing shards: plan, encode, shard, publish; resumable."""
