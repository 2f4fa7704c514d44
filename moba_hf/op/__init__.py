"""The operator: its definition, its torch operators, and the backends that need no Triton."""
