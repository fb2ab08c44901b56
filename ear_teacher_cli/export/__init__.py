"""Exported backbones."""
