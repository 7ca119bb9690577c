"""ViT-Linearizer in JAX: vision transformers distilled to linear time."""

__version__ = '0.1.0'
