"""Presets, one JSON file each, with the source of every number."""
