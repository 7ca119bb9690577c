"""ViT-Linearizer in JAX: vision transformers distilled to linear time."""

from linearizer_jax.models import create_model, list_models

__all__ = ['create_model', 'list_models']
__version__ = '0.1.0'
