"""Images and codes: tar shards with an index, addressed reading order, transforms, and loaders."""
