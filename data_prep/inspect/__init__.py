"""Inspecting sets of shards: verify, info, statistics, contact sheet, indexing of foreign tars."""
