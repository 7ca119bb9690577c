"""Shards from archives and folders, and the list of a folder's images."""

import hashlib
import io
import json
import logging
import os
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy import io as scipy_io

from linearizer_jax.data import datasets, listing, pipeline, prepare

CLASSES = ['n01', 'n02', 'n03']


def jpeg(value):
  file = io.BytesIO()
  Image.new('RGB', (24, 20), (value, 40, 200)).save(file, 'JPEG')
  return file.getvalue()


def add(tar, name, content):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
  """ImageNet's archives with three classes; two images each, four to check."""
  folder = tmp_path / 'tars'
  folder.mkdir()
  with tarfile.open(folder / prepare.TRAIN, 'w') as outer:
    for label, name in reversed(list(enumerate(CLASSES))):
      file = io.BytesIO()
      with tarfile.open(fileobj=file, mode='w') as inner:
        for i in range(2):
          add(inner, f'{name}_{i}.JPEG', jpeg(50 * label + i))
      add(outer, f'{name}.tar', file.getvalue())
  with tarfile.open(folder / prepare.VAL, 'w') as tar:
    for i in (2, 0, 3, 1):
      add(tar, f'ILSVRC2012_val_{i:08d}.JPEG', jpeg(100 + i))
  # The devkit numbers classes in an order of its own; 4 is an inner node.
  kind = [('ILSVRC2012_ID', 'f8'), ('WNID', 'O'), ('num_children', 'f8')]
  rows = [(1, 'n03', 0), (2, 'n01', 0), (3, 'n02', 0), (4, 'n00', 3)]
  meta = io.BytesIO()
  table = np.asarray(rows, dtype=kind).reshape(-1, 1)
  scipy_io.savemat(meta, {'synsets': table})
  with tarfile.open(folder / prepare.DEVKIT, 'w:gz') as tar:
    add(tar, 'kit/data/meta.mat', meta.getvalue())
    truth = 'kit/data/ILSVRC2012_validation_ground_truth.txt'
    add(tar, truth, b'1\n2\n3\n1\n')
  return folder


def source(out, split):
  return datasets.DATASETS['records'].load(
    None, pipeline.DataConfig(name='records', data_dir=str(out)), split
  )


def test_imagenet_archives_become_shards(tars, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, '_CLASSES_A_SHARD', 2)
  monkeypatch.setattr(prepare, '_IMAGES_A_SHARD', 3)
  out = tmp_path / 'out'
  argv = ['imagenet', f'--tars={tars}', f'--out={out}', '--no-verify']
  prepare.main(argv)
  index = json.loads((out / 'index.json').read_text())
  assert index['classes'] == CLASSES
  counts = {s: [x['count'] for x in v] for s, v in index['splits'].items()}
  assert counts == {'train': [4, 2], 'val': [3, 1]}
  train, val = source(out, 'train'), source(out, 'val')
  assert train.num_classes == 3
  np.testing.assert_array_equal(train.labels(), [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(val.labels(), [2, 0, 1, 2])
  assert [train[i]['image'] for i in range(6)] == [
    jpeg(50 * label + i) for label in range(3) for i in range(2)
  ]
  assert [val[i]['image'] for i in range(4)] == [
    jpeg(100 + i) for i in range(4)
  ]
  assert train[3]['name'].endswith('train[3] n02/n02_1.JPEG')
  # Whole shards stay; one that was stopped half way is written again.
  shards = sorted(out.glob('*.array_record'))
  first, last = shards[0], shards[-1]
  before = first.stat().st_mtime_ns
  last.rename(last.with_suffix('.partial'))
  with pytest.raises(ValueError, match=f'shard {last} is gone'):
    source(out, 'val')
  prepare.main(argv)
  assert first.stat().st_mtime_ns == before
  assert source(out, 'val')[3]['image'] == jpeg(103)
  assert not list(out.glob('*.partial'))
  with pytest.raises(ValueError, match="no split 'test'"):
    source(out, 'test')


def test_archives_are_verified(tars, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match='published archive has 1d675b47d978'):
    prepare.prepare_imagenet(tars, out, ('train',))
  assert not list(out.glob('*.array_record'))
  right = hashlib.md5((tars / prepare.TRAIN).read_bytes()).hexdigest()
  sums = {prepare.TRAIN: right}
  prepare.prepare_imagenet(tars, out, ('train',), sums)
  # What was right once is not read again.
  monkeypatch.setattr(hashlib, 'file_digest', None)
  prepare.prepare_imagenet(tars, out, ('train',), sums)


def test_a_small_disk_and_missing_archives_are_refused(
  tars, tmp_path, monkeypatch, capsys
):
  out = tmp_path / 'out'
  monkeypatch.setattr(prepare, '_SPARE_BYTES', 2**62)
  with pytest.raises(ValueError, match='GB free, but the shards take'):
    prepare.prepare_imagenet(tars, out, checksums={})
  assert not list(out.iterdir())
  (tars / prepare.VAL).unlink()
  with pytest.raises(SystemExit):
    prepare.main(['imagenet', f'--tars={tars}', f'--out={out}'])
  assert f'There is no {tars / prepare.VAL}' in capsys.readouterr().err


def test_labels_that_do_not_fit_are_refused(tars, tmp_path):
  with tarfile.open(tars / prepare.VAL, 'w') as tar:
    add(tar, 'ILSVRC2012_val_00000000.JPEG', jpeg(1))
  with pytest.raises(ValueError, match=r'holds 1 images.* labels 4'):
    prepare.prepare_imagenet(tars, tmp_path / 'out', ('val',), {})


@pytest.fixture
def folder(tmp_path):
  """Two classes, two images each in both splits, settled an hour ago."""
  root = tmp_path / 'data'
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      place = root / split / name
      place.mkdir(parents=True)
      for i in range(2):
        (place / f'{i}.jpg').write_bytes(jpeg(100 * (name == 'dog') + i))
  settle(root)
  return root


def test_shards_of_other_images_are_refused(folder, tmp_path, capsys):
  out = tmp_path / 'out'
  argv = ['folder', f'--data_dir={folder}', f'--out={out}']
  prepare.main(argv)
  prepare.main(argv)
  assert source(out, 'val')[3]['image'] == jpeg(101)
  (folder / 'val' / 'cat' / '9.jpg').write_bytes(jpeg(9))
  with pytest.raises(SystemExit):
    prepare.main(argv)
  error = capsys.readouterr().err
  assert 'val-00000-of-00001.array_record was made of other images' in error
  with pytest.raises(SystemExit):
    prepare.main([*argv, '--splits=train'])
  assert '--splits is train, expected two' in capsys.readouterr().err


def settle(root):
  for place in root.glob('*/*'):
    os.utime(place, (place.stat().st_mtime - 3600,) * 2)


def names(root, split='train'):
  found = datasets.open_folder(root, ('train', 'val'), split)
  return [os.path.relpath(found.name(i), root) for i in range(len(found))]


def test_the_list_is_kept_until_the_folder_changes(folder, monkeypatch, caplog):
  caplog.set_level(logging.INFO)
  first = names(folder)
  assert first[0] == 'train/cat/0.jpg'
  assert (folder / '.train.index.npz').is_file()
  walk = listing.image_names
  monkeypatch.setattr(listing, 'image_names', None)  # not looked at again
  assert names(folder) == first
  monkeypatch.setattr(listing, 'image_names', walk)
  (folder / 'train' / 'cat' / '5.png').write_bytes(jpeg(1))
  assert 'train/cat/5.png' in names(folder)
  assert 'changed a moment ago' in caplog.text
  (folder / 'train' / 'cat' / '0.jpg').unlink()
  assert 'train/cat/0.jpg' not in names(folder)
  settle(folder)
  (folder / '.train.index.npz').write_bytes(b'damaged')
  assert len(names(folder)) == 4


def test_read_only_data_keep_the_list_elsewhere(
  folder, tmp_path, monkeypatch, caplog
):
  caplog.set_level(logging.INFO)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  make = listing.tempfile.TemporaryDirectory

  def refuse(dir, **kwargs):
    if pathlib.Path(dir) == folder or refuse.everything:
      raise PermissionError(dir)
    return make(dir=dir, **kwargs)

  refuse.everything = False
  monkeypatch.setattr(listing.tempfile, 'TemporaryDirectory', refuse)
  first = names(folder)
  (kept,) = (tmp_path / 'cache' / 'linearizer_jax').iterdir()
  assert f'kept as {kept}' in caplog.text
  monkeypatch.setattr(listing, 'image_names', None)
  assert names(folder) == first
  monkeypatch.undo()
  caplog.set_level(logging.INFO)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'other'))
  refuse.everything = True
  monkeypatch.setattr(listing.tempfile, 'TemporaryDirectory', refuse)
  assert names(folder) == first
  assert 'not kept: neither' in caplog.text


@pytest.mark.parametrize('paired', [False, True])
def test_flat_evaluation_split(folder, paired):
  for place in (folder / 'val').iterdir():
    for image in place.iterdir():
      image.rename(folder / 'val' / f'{place.name}{image.name}')
    place.rmdir()
  lines = ['cat', 'cat', 'dog', 'dog']
  if paired:
    (folder / 'val' / 'cat1.jpg').rename(folder / 'val' / 'cat 1.jpg')
    files = ['cat0.jpg', 'cat 1.jpg', 'dog0.jpg', 'dog1.jpg']
    lines = [f'{f} {name}' for f, name in zip(files, lines, strict=True)][::-1]
  (folder / 'val_labels.txt').write_text('\n'.join(lines))
  found = datasets.open_folder(folder, ('train', 'val'), 'val')
  np.testing.assert_array_equal(found.labels(), [0, 0, 1, 1])
  assert found[2]['image'] == jpeg(100)
  (folder / 'val_labels.txt').write_text('\n'.join(lines[:3]))
  with pytest.raises(ValueError, match=r'has 3 lines, .* 4 images'):
    names(folder, 'val')
