"""Commands about shards."""
