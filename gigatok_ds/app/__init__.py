"""A local page that shows what trained models do: a tokenizer's codes, and a generator's samples."""
