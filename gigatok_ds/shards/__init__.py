"""WebDataset tars: their index, random access, and copies of remote ones."""
