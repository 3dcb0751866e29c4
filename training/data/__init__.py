"""From shards to batches: sample order (plan), node-local shards (cache), frames (decode), batches (loader)."""
