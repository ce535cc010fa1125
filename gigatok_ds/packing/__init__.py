"""Making shards: of images from wherever they lie, and of codes."""
