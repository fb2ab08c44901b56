"""Photographs in, ear crops out."""
