"""The model, its losses and its training."""
