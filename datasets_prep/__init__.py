"""Annotations and videos to shards."""
