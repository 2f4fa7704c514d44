"""MoBA attention: its definition, its torch operators, and the backends that do not need Triton."""
