"""Images in ArrayRecord shards, as `data.prepare` writes them.

A folder holds `index.json` with the classes and, for each split, its shards and
their counts; beside each shard `X.array_record`, whose records are the encoded
images, lies `X.npz` with their labels and names.
"""

import json
import pathlib

import grain
import numpy as np

INDEX = 'index.json'


class Records:
  """A split of a folder of shards, at random access."""

  def __init__(self, root, split):
    root = pathlib.Path(root).expanduser()
    index = read_index(root)
    if split not in index['splits']:
      raise ValueError(
        f'{root / INDEX} has no split {split!r}, only '
        f'{sorted(index["splits"])}: change data.train_split or '
        'data.eval_split, or prepare that split too.'
      )
    shards = index['splits'][split]
    for shard in shards:
      path = root / shard['file']
      if not path.is_file():
        raise ValueError(
          f'The shard {path} is gone: run `python -m '
          'linearizer_jax.data.prepare` again, which writes what is missing.'
        )
    # With its count in the name, no shard is opened before it is read.
    self._records = grain.sources.ArrayRecordDataSource(
      [f'{root / shard["file"]}[0:{shard["count"]}]' for shard in shards]
    )
    tables = [read_table(root / shard['file']) for shard in shards]
    self._labels = np.concatenate([labels for labels, _ in tables])
    self._names = np.concatenate([names for _, names in tables])
    self._where = f'{root} {split}'
    self.num_classes = len(index['classes'])

  def __len__(self):
    return len(self._labels)

  def name(self, index):
    return f'{self._where}[{index}] {self._names[index].decode()}'

  def __getitem__(self, index):
    try:
      image = self._records[index]
    except (RuntimeError, ValueError, OSError) as error:
      raise ValueError(
        f'Cannot read {self.name(index)} ({error}). Remove the damaged shard '
        'and prepare the data again, which writes what is missing.'
      ) from error
    return {
      'image': image,
      'label': int(self._labels[index]),
      'name': self.name(index),
    }

  def labels(self):
    return self._labels


def read_index(root):
  """The content of `index.json`, a dict; ValueError where there is none."""
  path = root / INDEX
  if not path.is_file():
    raise ValueError(
      f'There is no {path}: prepare the data with `python -m '
      f'linearizer_jax.data.prepare imagenet --tars=DIR --out={root}`, or '
      'point the config field data.data_dir to where they are.'
    )
  return json.loads(path.read_text())


def read_table(shard):
  """(labels int64 (n,), names bytes (n,)) of the records of a shard."""
  with np.load(shard.with_suffix('.npz')) as table:
    return table['labels'].astype(np.int64), table['names']
