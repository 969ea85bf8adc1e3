"""Writing sets of shards: list, plan, encode, write, finalize; resumable."""
