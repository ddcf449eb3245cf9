"""Drawing token pyramids scale by scale."""
