"""The teacher network, its weights and its files."""
