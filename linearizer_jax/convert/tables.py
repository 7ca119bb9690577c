"""Weights of other code bases to our parameters and back, by tables of names.

A table is plain data, a dict:
  'rows': tuples (ours, theirs, kind). With a kind of LAYERS, `ours` is a layer
    in our parameter tree, 'resblocks_{n}/ln_1', and `theirs` a module in their
    state_dict; with a kind of TRANSFORMS, both name one array. `theirs` may be
    a tuple of names whose arrays are stacked along their first axis. '{n}'
    stands for the number of a block: such a row counts once for every block
    that our model has. A row counts only where our model has the array.
  'prefix': what the names of the whole network start with, where some files
    have it and some do not ('vision_model.'), or ''. `theirs` is written with
    it.
  'ignored': shell patterns of names that may be left unread, such as a text
    tower, or a head that our model does without.
A family of weights is a tuple of such tables, its spellings.

Everything here is numpy: a tensor is whatever np.asarray takes.
"""

import itertools
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

# kind of one array -> (theirs to ours, ours to theirs). Each pair is exact.
TRANSFORMS = {
  'same': (lambda x: x, lambda x: x),
  # Linear: (out, in) <-> (in, out).
  'transpose': (np.transpose, np.transpose),
  # Conv2d: (out, in, height, width) <-> (height, width, in, out).
  'conv2d': (
    lambda x: np.transpose(x, (2, 3, 1, 0)),
    lambda x: np.transpose(x, (3, 2, 0, 1)),
  ),
  # ConvTranspose2d: (in, out, height, width) <-> (height, width, in, out); ours
  # is a correlation with the dilated image, hence turned by 180 degrees.
  'conv_transpose2d': (
    lambda x: np.transpose(x, (2, 3, 0, 1))[::-1, ::-1],
    lambda x: np.transpose(x[::-1, ::-1], (2, 3, 0, 1)),
  ),
  # Depthwise Conv1d: (channels, 1, taps) <-> (taps, channels).
  'conv1d': (lambda x: x[:, 0].T, lambda x: x.T[:, None]),
  # One or two leading axes of length 1 that we do without.
  'lead1': (lambda x: x[0], lambda x: x[None]),
  'lead2': (lambda x: x[0, 0], lambda x: x[None, None]),
}

# kind of a layer -> its arrays: (ours, theirs, transform).
LAYERS = {
  'norm': (('/scale', '.weight', 'same'), ('/bias', '.bias', 'same')),
  'linear': (('/kernel', '.weight', 'transpose'), ('/bias', '.bias', 'same')),
  'conv': (('/kernel', '.weight', 'conv2d'), ('/bias', '.bias', 'same')),
  'conv_transpose': (
    ('/kernel', '.weight', 'conv_transpose2d'),
    ('/bias', '.bias', 'same'),
  ),
  'batch_norm': (
    ('/scale', '.weight', 'same'),
    ('/bias', '.bias', 'same'),
    ('/mean', '.running_mean', 'same'),
    ('/var', '.running_var', 'same'),
  ),
  'depthwise': (('/kernel', '.weight', 'conv1d'), ('/bias', '.bias', 'same')),
}

SHOWN = 6  # names listed in an error before the rest is only counted


def _paths(params, parent=''):
  """Nested parameters -> {'resblocks_0/ln_1/scale': leaf}."""
  paths = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      paths |= _paths(value, f'{parent}{name}/')
    else:
      paths[parent + name] = value
  return paths


def _nested(paths):
  """The inverse of `_paths`."""
  params = {}
  for path, leaf in paths.items():
    *parents, name = path.split('/')
    layer = params
    for parent in parents:
      layer = layer.setdefault(parent, {})
    layer[name] = leaf
  return params


def _expanded(table, paths):
  """{our path: (their names, transform)} for those `paths` the table names."""
  rows = {}
  for ours, theirs, kind in table['rows']:
    names = (theirs,) if isinstance(theirs, str) else theirs
    for left, right, transform in LAYERS.get(kind, (('', '', kind),)):
      for n in itertools.count() if '{n}' in ours else (0,):
        path = (ours + left).replace('{n}', str(n))
        if path not in paths:
          break
        full = tuple((name + right).replace('{n}', str(n)) for name in names)
        rows[path] = full, transform
  return rows


def _split(row, value):
  """Our array -> {their name: array}."""
  names, transform = row
  parts = np.split(TRANSFORMS[transform][1](value), len(names))
  return dict(zip(names, parts, strict=True))


def to_state_dict(table, params):
  """Our parameters under the names and in the layout of `table`.

  Args:
    table: one spelling of a family.
    params: nested dict of arrays, all of which the table must name.

  Returns:
    {name: contiguous numpy array}, values and dtypes untouched.

  Raises:
    ValueError: a parameter that no row names.
  """
  paths = _paths(params)
  rows = _expanded(table, paths)
  nameless = sorted(paths.keys() - rows.keys())
  if nameless:
    raise ValueError(
      f'{listed(nameless)} cannot be written: the table of names has no row '
      'for these parameters.'
    )
  tensors = {}
  for path, row in rows.items():
    tensors |= _split(row, np.asarray(paths[path]))
  return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def from_state_dict(tables, tensors, shapes, source='the given tensors'):
  """Tensors of any spelling of a family as our parameters.

  Args:
    tables: the spellings of the family; the one with most names in `tensors`
      is taken.
    tensors: {name: array}.
    shapes: our parameter tree of anything with shape and dtype, such as
      `jax.eval_shape(model.init, ...)['params']`.
    source: what the tensors came from, for the error.

  Returns:
    Nested dict like `shapes` of numpy arrays of its dtypes.

  Raises:
    ValueError: tensors that are missing, left over, of another shape or not
      finite; names all of them in one paragraph.
  """
  paths = _paths(shapes)
  candidates = []
  for table in tables:
    table = _spelled(table, tensors)
    rows = _expanded(table, paths)
    hits = sum(name in tensors for names, _ in rows.values() for name in names)
    candidates.append((hits, rows, table['ignored']))
  _, rows, ignored = max(candidates, key=lambda candidate: candidate[0])

  expected = {}  # their name -> shape
  for path, row in rows.items():
    # No memory: one zero, broadcast.
    like = np.broadcast_to(np.zeros((), np.float32), paths[path].shape)
    expected |= {name: x.shape for name, x in _split(row, like).items()}
  nameless = sorted(paths.keys() - rows.keys())
  _refuse_mismatch(expected, tensors, nameless, ignored, source)

  params = {}
  for path, (names, transform) in rows.items():
    x = np.concatenate([np.asarray(tensors[name]) for name in names])
    x = TRANSFORMS[transform][0](x)
    params[path] = np.ascontiguousarray(x, paths[path].dtype)
  broken = sorted(p for p, x in params.items() if not np.isfinite(x).all())
  if broken:
    raise ValueError(
      f'{source} holds NaN or infinite values in {listed(broken)}. The file '
      'is damaged, or comes from a run that diverged: take another one.'
    )
  return _nested(params)


def _spelled(table, tensors):
  """The table, without its prefix where no tensor has it."""
  prefix = table['prefix']
  if any(name.startswith(prefix) for name in tensors):
    return table

  def bare(names):
    if isinstance(names, str):
      return names.removeprefix(prefix)
    return tuple(name.removeprefix(prefix) for name in names)

  # What lies outside the prefix is not in such a file.
  ignored = tuple(p for p in table['ignored'] if p.startswith(prefix))
  rows = [(ours, bare(theirs), kind) for ours, theirs, kind in table['rows']]
  return {'prefix': '', 'ignored': bare(ignored), 'rows': rows}


def _refuse_mismatch(expected, found, nameless, ignored, source):
  """Raises if the names or shapes of a file are not those of the model."""
  missing = sorted(expected.keys() - found.keys()) + nameless
  extra = sorted(
    name
    for name in found.keys() - expected.keys()
    if not any(fnmatchcase(name, pattern) for pattern in ignored)
  )
  wrong = [
    f'{name} ({tuple(np.shape(found[name]))} instead of {shape})'
    for name, shape in sorted(expected.items())
    if name in found and np.shape(found[name]) != shape
  ]
  parts = [
    f'{label}: {listed(names)}'
    for label, names in (
      ('missing', missing),
      ('extra', extra),
      ('of another shape', wrong),
    )
    if names
  ]
  if parts:
    raise ValueError(
      f'{source} does not fit the model. {"; ".join(parts)}. Choose the model '
      'these weights were made for (of a teacher config.teacher.name and its '
      'width, depth, num_heads, patch_size, image_size; num_classes=0 leaves '
      'a head out), or the weights of this model.'
    )


def listed(names):
  """The first names, and how many more there are."""
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more
