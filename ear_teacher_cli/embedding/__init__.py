"""Embeddings from images."""
