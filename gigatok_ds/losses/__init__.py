"""One file per term of the tokenizer's objective, and their composition."""
