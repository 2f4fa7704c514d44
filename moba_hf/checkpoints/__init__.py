"""Reading, converting, verifying and inspecting checkpoint files."""
