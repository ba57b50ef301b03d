"""Floor 1: what the loader, the model and the disk all speak of."""
