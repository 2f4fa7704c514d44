"""Checkpoint files: read, converted, verified, inspected."""
