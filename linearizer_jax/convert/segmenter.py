"""Names of a segmenter's head, running statistics included.

The backbone keeps the released names of the Adventurer beside them.
"""

from flax import traverse_util

from linearizer_jax.convert import adventurer, tables

PREFIX = 'segment.'
_CONV_NORMS = (
  *('decoder/pool_{n}', 'decoder/lateral_{n}', 'decoder/fpn_{n}'),
  *('decoder/bottleneck', 'decoder/fuse', 'auxiliary_conv'),
)
_LAYERS = (
  *((f'{name}/conv', 'conv') for name in _CONV_NORMS),
  *((f'{name}/norm', 'batch_norm') for name in _CONV_NORMS),
  # Patches of up to 32 pixels are enlarged up to three times.
  *((f'decoder/rescale_{{n}}/up_{i}', 'conv_transpose') for i in range(3)),
  *((f'decoder/rescale_{{n}}/norm_{i}', 'batch_norm') for i in (1, 2)),
  ('decoder/classifier/conv', 'conv'),
  ('auxiliary_classifier/conv', 'conv'),
  ('classifier/conv', 'conv'),
)
SEGMENTER = {
  'prefix': '',
  'ignored': (),
  'rows': tuple(
    (name, PREFIX + name.replace('/', '.'), kind) for name, kind in _LAYERS
  ),
}


def to_tensors(variables):
  """{name: array} of a segmenter on an Adventurer.

  Args:
    variables: {'params': {'backbone': ..., heads}, 'batch_stats': ...}.

  Raises:
    ValueError: a parameter without a name there.
  """
  heads = dict(variables['params'])
  backbone = heads.pop('backbone')
  merged = _flat(heads) | _flat(variables.get('batch_stats', {}))
  return tables.to_state_dict(
    adventurer.ADVENTURER, backbone
  ) | tables.to_state_dict(SEGMENTER, traverse_util.unflatten_dict(merged))


def from_tensors(tensors, shapes, source):
  """The variables of a segmenter, from what `to_tensors` gave.

  Args:
    tensors: {name: array}.
    shapes: `jax.eval_shape(model.init, ...)`.
    source: what the tensors came from, for the error.

  Raises:
    ValueError: as `tables.from_state_dict`.
  """
  heads = dict(shapes['params'])
  backbone = heads.pop('backbone')
  stats = _flat(shapes.get('batch_stats', {}))
  merged = traverse_util.unflatten_dict(_flat(heads) | stats)
  parts = [
    {k: v for k, v in tensors.items() if k.startswith(PREFIX) == above}
    for above in (False, True)
  ]
  found = tables.from_state_dict(
    (adventurer.ADVENTURER,), parts[0], backbone, source
  )
  merged = _flat(tables.from_state_dict((SEGMENTER,), parts[1], merged, source))
  heads, running = (
    traverse_util.unflatten_dict(
      {k: v for k, v in merged.items() if (k in stats) == wanted}
    )
    for wanted in (False, True)
  )
  variables = {'params': heads | {'backbone': found}}
  return variables | ({'batch_stats': running} if stats else {})


def _flat(tree):
  return traverse_util.flatten_dict(tree)
