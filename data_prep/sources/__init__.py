"""Where images come from: folders, archives, lists, shards."""
