"""ViT-Linearizer in JAX: vision transformers distilled to linear time."""

from linearizer_jax.models import create_model, features, list_models

__all__ = ['create_model', 'features', 'list_models', 'load']
__version__ = '0.1.0'


def __getattr__(name):
  # Later than the rest: it imports all that reads weights.
  if name == 'load':
    from linearizer_jax.convert.load import load

    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
