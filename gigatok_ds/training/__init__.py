"""Training: the engine, the loop, and what one step of a tokenizer or a GPT is."""
