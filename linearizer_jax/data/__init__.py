"""Images in, uint8 batches out: NumPy, Pillow and grain, never jax arrays."""
