"""Pictures to embedding shards, and shards to whoever trains or measures on them."""
