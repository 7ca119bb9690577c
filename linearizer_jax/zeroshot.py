"""Classifying by texts: embeddings of the class names become the head.

A class scores the cosine of its text with the image's class token in the space
that the teacher shares with texts. Dividing by the length of the class token
changes no order, so the scores are one linear layer on it.
"""

import pathlib

import numpy as np


def head(config, projection):
  """The classification head that texts and a projection amount to.

  Source: CLIP (arXiv 2103.00020), section 3.1.

  Args:
    config: with `classify.text_embeddings`, an .npz of 'embeddings' (V, E), of
      unit length, and 'classes' (V,), in the order of the labels
      (`python -m linearizer_jax.convert text`).
    projection: from the class token to (E,): an array (D, E), or a linear
      layer {'kernel': (D, E), 'bias': (E,)}.

  Returns:
    {'kernel': (D, V), 'bias': (V,)} float32.

  Raises:
    ValueError: no such file, or texts of another width than the projection.
  """
  path = config.classify.text_embeddings
  if not path or not pathlib.Path(path).is_file():
    raise ValueError(
      f'config.classify.text_embeddings is {path!r}, which is no file. Make '
      'one with python -m linearizer_jax.convert text --teacher=... '
      '--classes=FILE --out=FILE.npz.'
    )
  texts = np.asarray(np.load(path)['embeddings'], np.float32)  # (V, E)
  if projection is None:
    raise ValueError(
      f'config.teacher.name is {config.teacher.name!r}, which has no space in '
      'common with texts; expected a CLIP.'
    )
  if not isinstance(projection, dict):
    projection = {'kernel': projection, 'bias': np.zeros(projection.shape[-1])}
  kernel = np.asarray(projection['kernel'], np.float32)
  bias = np.asarray(projection['bias'], np.float32)
  if kernel.shape[1] != texts.shape[1]:
    raise ValueError(
      f'the texts of {path} have width {texts.shape[1]}, the class token is '
      f'projected to {kernel.shape[1]}: take the text tower of the same CLIP.'
    )
  return {'kernel': kernel @ texts.T, 'bias': bias @ texts.T}
