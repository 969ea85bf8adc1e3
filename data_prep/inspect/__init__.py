"""Reading shards back: verify, info, statistics, contact sheet, index."""
