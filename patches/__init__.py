"""Per-architecture adapters: facts about where a family keeps its attention layers."""
