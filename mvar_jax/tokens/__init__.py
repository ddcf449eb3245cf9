"""Images to token ids, and caches of them."""
