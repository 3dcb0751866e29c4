"""Checkpoint and shards to ranked videos."""
