"""Shards to a checkpoint."""
