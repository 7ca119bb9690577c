"""ViT-Linearizer in JAX: vision transformers distilled to linear time."""

try:
  from linearizer_jax.models import create_model, features, list_models
except ModuleNotFoundError as error:
  if error.name != 'linearizer_jax.kernels':
    raise
  raise ImportError(
    'linearizer_jax was found in its source folder, which is not installed as '
    'one: run `pip install -e .` there (with -e), or leave that folder.'
  ) from error

__all__ = ['create_model', 'features', 'list_models', 'load']
__version__ = '0.1.0'


def __getattr__(name):
  # Later than the rest: it imports all that reads weights.
  if name == 'load':
    from linearizer_jax.convert.load import load

    return load
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
