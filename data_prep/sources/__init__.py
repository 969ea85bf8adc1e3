"""Image sources: folders, archives, lists and shards, local or remote."""
