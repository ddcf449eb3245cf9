"""Flax linen modules: the tokenizer and the transformer."""
