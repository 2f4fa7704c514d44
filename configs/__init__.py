"""Presets: one JSON file each, with the origin of every number."""
