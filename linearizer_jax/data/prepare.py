"""Images as shards that are fast at random access, also on a slow disk.

python -m linearizer_jax.data.prepare imagenet --tars=DIR --out=DIR
python -m linearizer_jax.data.prepare folder --data_dir=DIR --out=DIR

DIR of --tars holds ImageNet as published: ILSVRC2012_img_train.tar,
ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz. Nothing is unpacked on
the way: images go into the shards as they are. A run that was stopped goes on
with the first shard that is not whole. Train with `--config.data.name=records
--config.data.data_dir=OUT`.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import tarfile

import numpy as np
from array_record.python import array_record_module
from tqdm import tqdm

from linearizer_jax.data import datasets, listing, records

TRAIN, VAL = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
DEVKIT = 'ILSVRC2012_devkit_t12.tar.gz'
MD5 = {
  TRAIN: '1d675b47d978889d74fa0da5fadfb00e',
  VAL: '29b22e2961454d5413ddabcf34fc5622',
  DEVKIT: 'fa75699e90414af021442c21a62c3abf',
}
# A gigabyte or so of training images: 125 shards. Each worker that reads keeps
# every shard open, and 1024 open files are a common limit.
_CLASSES_A_SHARD = 8
_IMAGES_A_SHARD = 6250  # elsewhere: 8 shards of ImageNet's validation split
# Images are compressed already; groups of one are what random access wants.
_OPTIONS = 'group_size:1,uncompressed'
_CHECKED = 'checked.json'
_SPARE_BYTES = 2**30

_log = logging.getLogger('linearizer_jax')


def prepare_imagenet(tars, out, splits=('train', 'val'), checksums=MD5):
  """Writes the shards of ImageNet-1k; whole ones from before are kept.

  Args:
    tars: folder of the published archives.
    out: folder to write; made where it is missing.
    splits: of 'train' and 'val'.
    checksums: file name -> expected MD5; a file that has none is not checked.

  Raises:
    ValueError: an archive is missing, is not the published one or does not hold
      what it should, or the disk is too small. Nothing is written before.
  """
  tars, out = (pathlib.Path(path).expanduser() for path in (tars, out))
  archives = {'train': TRAIN, 'val': VAL}
  if not set(splits) <= set(archives):
    raise ValueError(f'--splits is {splits}, expected train, val or both.')
  # The devkit numbers the classes that validation labels mean.
  needed = [archives[s] for s in splits] + [DEVKIT] * ('val' in splits)
  for name in needed:
    if not (tars / name).is_file():
      raise ValueError(
        f'There is no {tars / name}. Expected the published {", ".join(needed)}'
        ' in --tars; get them from image-net.org after signing in.'
      )
  out.mkdir(parents=True, exist_ok=True)
  _check_space(out, splits, [(tars / name).stat().st_size for name in needed])
  for name in needed:
    _check_md5(tars / name, out, checksums)

  classes, files = _devkit(tars / DEVKIT) if 'val' in splits else (None, None)
  written = {}
  if 'train' in splits:
    classes, written['train'] = _train(tars / TRAIN, out, classes)
  if 'val' in splits:
    written['val'] = _validation(tars / VAL, out, classes, files)
  _write_index(out, classes, written)


def prepare_folder(data_dir, out, splits=('train', 'val')):
  """Writes shards of `data_dir/<split>/<class>/` of JPEG and PNG files.

  Args:
    data_dir: folder, as of `data.name='folder'`.
    out: folder to write; made where it is missing.
    splits: (training, evaluation).

  Raises:
    ValueError: the folders are not as expected, the disk is too small, or `out`
      has shards of other images.
  """
  if len(splits) != 2:
    raise ValueError(
      f'--splits is {",".join(splits)}, expected two folders of --data_dir: '
      'for training and for evaluation.'
    )
  out = pathlib.Path(out).expanduser()
  out.mkdir(parents=True, exist_ok=True)
  sources = {
    split: datasets.open_folder(data_dir, splits, split) for split in splits
  }
  _check_space(
    out,
    splits,
    [
      os.path.getsize(source.name(i))
      for source in sources.values()
      for i in range(len(source))
    ],
  )
  written = {}
  for split, source in sources.items():

    def listed(part, source=source):
      names = [os.path.relpath(source.name(i), source.root) for i in part]
      return list(zip(source.labels()[part].tolist(), names, strict=True))

    def examples(part, source=source, listed=listed):
      for i, (label, name) in zip(part, listed(part), strict=True):
        yield source[i]['image'], label, name

    parts = _parts(len(source), _IMAGES_A_SHARD)
    written[split] = _write_shards(out, split, parts, examples, listed)
  _write_index(out, datasets.folder_classes(data_dir, splits), written)


def write_shard(path, examples):
  """Writes one shard and its table; whole or not at all.

  Args:
    path: `X.array_record`.
    examples: iterable of (encoded image, label, name).
  """
  partial = path.with_suffix('.partial')
  partial.unlink(missing_ok=True)
  writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
  labels, names = [], []
  for image, label, name in examples:
    writer.write(image)
    labels.append(label)
    names.append(os.fsencode(name))
  writer.close()
  reader = array_record_module.ArrayRecordReader(str(partial))
  if reader.num_records() != len(labels):
    raise OSError(
      f'{partial} holds {reader.num_records()} of {len(labels)} images: the '
      'disk did not take them all.'
    )
  reader.close()
  np.savez(
    path.with_suffix('.npz'),
    labels=np.asarray(labels, np.int32),
    names=np.asarray(names, np.bytes_),
  )
  os.replace(partial, path)  # last: a shard of this name is whole


def _train(archive, out, classes):
  """Shards of an archive of archives, one for each class; in class order."""
  with tarfile.open(archive) as outer:
    members = {
      member.name.removesuffix('.tar'): member
      for member in outer
      if member.isfile() and member.name.endswith('.tar')
    }
    if not members or (classes and sorted(members) != classes):
      raise ValueError(
        f'{archive} holds archives of {len(members)} classes, expected those '
        f'of {len(classes or ()) or "one or more"} classes in {DEVKIT}.'
      )
    classes = sorted(members)

    def examples(part):
      for label in range(part.start, part.stop):
        inside = outer.extractfile(members[classes[label]])
        with tarfile.open(fileobj=inside) as inner:
          for name, image in _images(inner):
            yield image, label, f'{classes[label]}/{name}'

    parts = _parts(len(classes), _CLASSES_A_SHARD)
    return classes, _write_shards(out, 'train', parts, examples)


def _validation(archive, out, classes, truth):
  """Shards of a flat archive; its images in the order of their names."""
  with tarfile.open(archive) as tar:
    members = sorted(
      (member for member in tar if member.isfile()), key=lambda m: m.name
    )
    if len(members) != len(truth):
      raise ValueError(
        f'{archive} holds {len(members)} images, but {DEVKIT} labels '
        f'{len(truth)}: one of them is not whole.'
      )
    label_of = {name: label for label, name in enumerate(classes)}

    def listed(part):
      return [(label_of[truth[i]], members[i].name) for i in part]

    def examples(part):
      for i, (label, name) in zip(part, listed(part), strict=True):
        yield tar.extractfile(members[i]).read(), label, name

    parts = _parts(len(members), _IMAGES_A_SHARD)
    return _write_shards(out, 'val', parts, examples, listed)


def _write_shards(out, split, parts, examples, listed=None):
  """Writes the shards that are not there; [{'file', 'count'}, ...] of all.

  `listed` gives the (label, name) of each image of a part, where that is known
  without reading the images: a shard from before has to hold the same.
  """
  shards = []
  for number, part in enumerate(tqdm(parts, desc=split, unit='shard')):
    path = out / f'{split}-{number:05d}-of-{len(parts):05d}.array_record'
    if not path.is_file():
      write_shard(path, examples(part))
    labels, names = records.read_table(path)
    held = zip(labels.tolist(), map(os.fsdecode, names), strict=True)
    if listed and list(held) != listed(part):
      raise ValueError(
        f'{path} was made of other images than there are now: choose another '
        f'--out, or remove {out}.'
      )
    shards.append({'file': path.name, 'count': len(labels)})
  return shards


def _write_index(out, classes, written):
  """Adds splits to `index.json`; those written earlier stay."""
  path = out / records.INDEX
  old = json.loads(path.read_text()) if path.is_file() else {}
  if old and old['classes'] != classes:
    raise ValueError(
      f'{path} is of {len(old["classes"])} other classes: choose another --out.'
    )
  content = {
    'classes': classes,
    'fields': {
      'image': 'the record: JPEG or PNG bytes as published',
      'label': 'place in classes; `labels` of the .npz beside the shard',
      'name': 'in the archive; `names` of the .npz beside the shard',
    },
    'splits': old.get('splits', {}) | written,
  }
  path.with_suffix('.tmp').write_text(json.dumps(content, indent=1))
  os.replace(path.with_suffix('.tmp'), path)


def _images(tar):
  """(name, bytes) of each image of an archive, in its order."""
  for member in tar:
    if member.isfile() and member.name.lower().endswith(listing.IMAGE_SUFFIXES):
      yield member.name, tar.extractfile(member).read()


def _devkit(path):
  """(sorted WordNet ids, id of each validation image) of the devkit."""
  from scipy import io as scipy_io

  with tarfile.open(path) as tar:
    found = {
      pathlib.PurePath(name).name: tar.extractfile(name).read()
      for name in tar.getnames()
      if name.endswith(('meta.mat', 'validation_ground_truth.txt'))
    }
  if len(found) != 2:
    raise ValueError(
      f'{path} should hold meta.mat and ILSVRC2012_validation_ground_truth.txt,'
      f' but holds {sorted(found)} of them.'
    )
  table = scipy_io.loadmat(
    io.BytesIO(found.pop('meta.mat')), squeeze_me=True, struct_as_record=False
  )['synsets']
  # Inner nodes of the tree are in the table too; classes have no children.
  ids = {
    int(row.ILSVRC2012_ID): str(row.WNID)
    for row in table
    if not row.num_children
  }
  (truth,) = found.values()
  return sorted(ids.values()), [ids[int(line)] for line in truth.split()]


def _parts(count, size):
  return [
    range(start, min(start + size, count)) for start in range(0, count, size)
  ]


def _check_space(out, splits, archive_bytes):
  """Raises ValueError where the shards would fill the disk."""
  written = [
    file.stat().st_size
    for split in splits
    for file in out.glob(f'{split}-*.array_record')
  ]
  more = max(0, sum(archive_bytes) - sum(written))
  free = shutil.disk_usage(out).free
  if free < more + _SPARE_BYTES:
    raise ValueError(
      f'{out} has {free / 1e9:.0f} GB free, but the shards take about '
      f'{more / 1e9:.0f} GB more and {_SPARE_BYTES / 1e9:.0f} GB should be '
      'left: make room or choose another --out.'
    )


def _check_md5(path, out, checksums):
  """Compares a file with its checksum, once: `out` remembers what was right."""
  if path.name not in checksums:
    return
  known = out / _CHECKED
  checked = json.loads(known.read_text()) if known.is_file() else {}
  stat = path.stat()
  identity = [stat.st_size, stat.st_mtime_ns, checksums[path.name]]
  if checked.get(path.name) == identity:
    return
  _log.info('computing the checksum of %s', path)
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'md5').hexdigest()
  if found != checksums[path.name]:
    raise ValueError(
      f'{path} has the MD5 {found}, but the published archive has '
      f'{checksums[path.name]}: download it again. --no-verify takes it as it '
      'is.'
    )
  known.write_text(json.dumps(checked | {path.name: identity}))


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog='python -m linearizer_jax.data.prepare',
    description=__doc__.split('\n')[0],
  )
  commands = parser.add_subparsers(dest='command', required=True)
  imagenet = commands.add_parser('imagenet', help='ImageNet-1k from its tars')
  imagenet.add_argument('--tars', required=True, help='folder of the archives')
  imagenet.add_argument('--out', required=True, help='folder for the shards')
  imagenet.add_argument(
    '--splits', default='train,val', help='train, val or both'
  )
  imagenet.add_argument(
    '--no-verify',
    action='store_true',
    help='skip the checksums of the archives (minutes), say of a subset of '
    'your own',
  )
  folder = commands.add_parser('folder', help='folders of classes')
  folder.add_argument('--data_dir', required=True, help='<split>/<class>/*.jpg')
  folder.add_argument('--out', required=True, help='folder for the shards')
  folder.add_argument(
    '--splits', default='train,val', help='for training and for evaluation'
  )
  options = parser.parse_args(argv)
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  splits = tuple(options.splits.split(','))
  try:
    if options.command == 'folder':
      prepare_folder(options.data_dir, options.out, splits)
    else:
      checksums = {} if options.no_verify else MD5
      prepare_imagenet(options.tars, options.out, splits, checksums)
  except (ValueError, OSError) as error:
    parser.exit(1, f'{error}\n')


if __name__ == '__main__':
  main()
