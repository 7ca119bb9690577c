"""Models by name: Adventurer students and ViT teachers."""

import dataclasses

import einops
import jax.numpy as jnp

from linearizer_jax.models import adventurer, layers, teachers, vit

# class -> {name: fields}
FAMILIES = {
  adventurer.Adventurer: adventurer.VARIANTS,
  vit.ViT: vit.VARIANTS,
}
DTYPE_FIELDS = ('dtype', 'residual_dtype')


def list_models():
  """Names that `create_model` takes, sorted."""
  return sorted(name for table in FAMILIES.values() for name in table)


def create_model(name, **overrides):
  """The linen Module of a named model.

  Args:
    name: one of `list_models()`, such as 'adventurer_base_patch16'.
    **overrides: fields of the Module that replace those of the name, such as
      `num_classes=10`, `image_size=(320, 512)`, `dtype='bfloat16'`.

  Returns:
    An unbound linen Module: `model.init(key, images)`, `model.apply(variables,
    images, token_mask=None, train=False) -> (logits, out)`.

  Raises:
    ValueError: an unknown name or field, with the known ones.
  """
  module, fields = _find(name)
  known = field_names(name)
  unknown = sorted(set(overrides) - known)
  if unknown:
    raise ValueError(
      f'{name} has no field {", ".join(unknown)}; its fields are '
      f'{", ".join(sorted(known))}.'
    )
  fields = {**fields, **overrides}
  for field, value in fields.items():
    if field in DTYPE_FIELDS and isinstance(value, str):
      try:
        fields[field] = jnp.dtype(value)
      except TypeError as error:
        raise ValueError(
          f'{field} is {value!r}; expected a type such as float32 or bfloat16: '
          f'change config.student.{field} or config.teacher.{field}.'
        ) from error
    if isinstance(value, list):  # configs read from JSON hold lists
      fields[field] = tuple(value)
  return module(**fields)


def field_names(name):
  """The fields that `create_model(name, ...)` takes."""
  fields = {field.name for field in dataclasses.fields(_find(name)[0])}
  return fields - {'name', 'parent'}


def features(model, variables, images, blocks=None):
  """Maps of patch tokens after the blocks, what dense tasks want.

  Args:
    model, variables: of any model here, such as what `load` returns.
    images: (B, H, W, 3) float, normalised; sides multiples of the patch size.
    blocks: numbers counted from 0; negative ones from the end; all when None.

  Returns:
    {'blockNN': (B, H / p, W / p, D)} in the model's residual dtype.

  Raises:
    ValueError: a number that is no block.
  """
  depth = model.depth
  blocks = range(depth) if blocks is None else blocks
  wrong = [n for n in blocks if not -depth <= n < depth]
  if wrong:
    raise ValueError(
      f'blocks {wrong} were asked for; the model has {depth}, from 0 to '
      f'{depth - 1}.'
    )
  rows, _ = layers.patch_grid(images.shape[1:3], model.patch_size)
  _, out = model.apply(variables, images)
  names = [f'block{n % depth:02d}' for n in blocks]
  return {
    name: einops.rearrange(out[name], 'b (h w) d -> b h w d', h=rows)
    for name in names
  }


def from_config(config, role, *, mesh=None, batch_axes=None, **fields):
  """The network of `config.student` or `config.teacher`.

  Fields that are None keep the named model's value. An `image_size` of None is
  that of the published weights, or else of the data.

  Args:
    config: resolved config of a stage, a ConfigDict.
    role: 'student' or 'teacher'.
    mesh, batch_axes: for models that scan; see `kernels.ssd.ssd`.
    **fields: fields of the model, which go before those of the config.

  Returns:
    (Module, (mean, std)): the statistics of its input.

  Raises:
    ValueError: as `create_model`.
  """
  section = config[role].to_dict()
  name = section.pop('name')
  section.pop('weights', None)
  mean, std = section.pop('mean'), section.pop('std')
  for field, value in (('mean', mean), ('std', std)):
    if value is not None and len(value) != 3:
      raise ValueError(
        f'config.{role}.{field} is {value}; expected a number each for red, '
        'green and blue.'
      )
  decided = {key: value for key, value in section.items() if value is not None}
  fields = decided | fields
  row = teachers.TEACHERS.get(name)
  name = row.model if row else name
  fields.setdefault(
    'image_size',
    row.image_size if row and row.source else config.data.image_size,
  )
  if 'mesh' in field_names(name):
    fields |= {'mesh': mesh, 'batch_axes': batch_axes}
  own_mean, own_std = row.normalization if row else teachers.IMAGENET
  stats = tuple(mean or own_mean), tuple(std or own_std)
  return create_model(name, **fields), stats


def _find(name):
  """(Module class, its fields) of a named model."""
  for module, table in FAMILIES.items():
    if name in table:
      return module, table[name]
  raise ValueError(
    f'there is no model {name!r}; known models, for config.student.name and '
    f'config.teacher.name: {", ".join(list_models())}.'
  )
