"""Student against teacher over resolutions: speed, memory, arithmetic."""
