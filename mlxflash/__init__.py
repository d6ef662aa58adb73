"""Models larger than memory: feed-forward weights stay on flash."""
