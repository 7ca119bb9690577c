"""Faults of the data, crops by SIMD libraries, and the bench."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from linearizer_jax.data import bench, pipeline, simd, transforms

needs_simd = pytest.mark.skipif(
  not simd.is_installed(), reason='the extra [simd] has no wheel here'
)


def photo(height, width, seed=0):
  """Smooth shapes and some noise, as a photograph has, JPEG bytes."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
  smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
  noisy = smooth + rng.normal(0, 4, smooth.shape)
  file = io.BytesIO()
  image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
  image.save(file, 'JPEG', quality=90)
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  """Two classes of four images for training, two for evaluation."""
  for split, count in (('train', 4), ('val', 2)):
    for label, name in enumerate(('cat', 'dog')):
      place = tmp_path / split / name
      place.mkdir(parents=True)
      for i in range(count):
        (place / f'{i}.jpg').write_bytes(photo(40, 60, 10 * label + i))
  return tmp_path


def config(folder, **fields):
  return {'name': 'folder', 'data_dir': str(folder), 'image_size': 16, **fields}


def iterator(folder, batch_size=8, **fields):
  return pipeline.make_train_iterator(
    config(folder, **fields), batch_size=batch_size, seed=3
  )


@pytest.mark.parametrize('num_workers', [0, 1])
def test_broken_images_are_passed_over(folder, num_workers):
  fields = {'shuffle': False, 'crop_scale': (0.5, 1.0)}
  whole = iterator(folder, **fields)
  expected = next(whole)
  whole.close()
  broken = folder / 'train' / 'cat' / '3.jpg'
  broken.write_bytes(broken.read_bytes()[:300])
  batches = iterator(folder, max_broken=1, num_workers=num_workers, **fields)
  first = next(batches)
  state = batches.get_state()
  second = next(batches)
  # The next example, the first dog, stands in; nothing else changes.
  assert sorted(first) == ['image', 'label']
  np.testing.assert_array_equal(first['label'], [0, 0, 0, 1, 1, 1, 1, 1])
  others = [0, 1, 2, 4, 5, 6, 7]
  np.testing.assert_array_equal(
    first['image'][others], expected['image'][others]
  )
  assert list(batches.broken) == [str(broken)]  # counted once
  assert state == {'step': 1}
  batches.set_state(state)
  np.testing.assert_array_equal(next(batches)['image'], second['image'])
  batches.close()


def test_more_broken_images_than_allowed(folder, caplog):
  for i in (0, 2):
    (folder / 'train' / 'dog' / f'{i}.jpg').write_bytes(b'no image')
  batches = iterator(folder, batch_size=2, max_broken=1, shuffle=False)
  next(batches), next(batches)
  next(batches)
  assert 'broken image 1, of 1 allowed' in caplog.text
  with pytest.raises(ValueError, match=r'2 images are broken.*dog/2.jpg'):
    next(batches)
  batches.close()


def test_images_that_are_all_broken_stop_the_run(folder):
  for path in folder.glob('train/*/*.jpg'):
    path.write_bytes(b'no image')
  batches = iterator(folder, max_broken=100, timeout_seconds=10.0)
  with pytest.raises(transforms.BrokenImageError):
    next(batches)
  batches.close()


def test_evaluation_leaves_broken_images_out(folder):
  (folder / 'val' / 'cat' / '1.jpg').write_bytes(b'no image')
  batches = pipeline.make_eval_batches(
    config(folder, max_broken=1), batch_size=4
  )
  for _ in range(2):
    (batch,) = batches
    np.testing.assert_array_equal(batch['valid'], [True, False, True, True])
    assert not batch['image'][1].any()
    assert sorted(batch) == ['image', 'label', 'valid']


def test_a_vanished_file_is_named(folder):
  batches = iterator(folder, max_broken=5)
  path = folder / 'train' / 'dog' / '1.jpg'
  path.unlink()
  with pytest.raises(ValueError, match=f'Cannot read the image {path}'):
    next(batches)
  batches.close()


@pytest.mark.parametrize(
  ('num_workers', 'seconds'),
  [(0, 2), pytest.param(1, 20, marks=pytest.mark.slow)],
)
def test_a_stalled_loader_stops_the_run(folder, num_workers, seconds):
  """A pipe nobody writes to stands for a disk that does not answer.

  A worker that hangs in the read is killed; a thread cannot be, so that the
  process then ends with the read.
  """
  fields = {'num_workers': num_workers, 'timeout_seconds': float(seconds)}
  path = folder / 'train' / 'cat' / '1.jpg'
  path.unlink()
  os.mkfifo(path)
  code = (
    'from linearizer_jax.data import pipeline\n'
    'if __name__ == "__main__":\n'
    f'  config = {config(folder, shuffle=False, **fields)!r}\n'
    '  batches = pipeline.make_train_iterator(config, batch_size=2, seed=0)\n'
    '  next(batches)'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code], stderr=subprocess.PIPE, text=True
  )
  lines = []
  for line in process.stderr:
    lines.append(line)
    if line.startswith('TimeoutError'):
      break
  if not num_workers:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
  process.communicate(timeout=60)
  assert process.returncode == 1
  assert f'for {seconds} s (data.timeout_seconds): batch 0' in lines[-1]
  assert f'of 2 images: {folder}/train/cat/0.jpg, {path}.' in lines[-1]


@needs_simd
@pytest.mark.parametrize('size', [(375, 500), (900, 1300)])
def test_simd_crops_are_those_of_pillow(size):
  """The larger image is decoded at a fraction of its size."""
  encoded = photo(*size)
  rng = np.random.default_rng(0)
  for _ in range(5):
    box = transforms.random_crop_box(
      size[::-1], (0.2, 1.0), (3 / 4, 4 / 3), rng
    )
    ours = simd.crop_and_resize(encoded, size[::-1], box, (96, 64))
    opened = transforms.open_image({'image': encoded, 'name': ''})
    exact = transforms.crop_and_resize(opened, box, (96, 64), '', exact=True)
    assert opened.size == size[::-1]  # nothing was drafted
    difference = np.asarray(ours).astype(int) - np.asarray(exact)
    assert ours.size == (64, 96)
    assert np.abs(difference).mean() < 1
    assert abs(difference.mean()) < 0.3
    assert np.abs(difference).max() <= 12


@needs_simd
def test_simd_crops_reach_the_edge():
  """Where the image is decoded smaller, its edge is hit but for a rounding."""
  for width in range(501, 540):
    size = width, 450
    encoded = photo(450, width)
    for left in range(8):
      box = left, left, *size
      assert simd.crop_and_resize(encoded, size, box, (64, 64)).size == (64, 64)


@needs_simd
def test_simd_reads_what_pillow_reads(folder):
  fields = {'shuffle': False, 'crop_scale': (0.5, 1.0)}
  place = folder / 'train' / 'cat'
  image = Image.open(place / '0.jpg')
  image.load()
  image.convert('L').save(place / '0.jpg')
  image.convert('CMYK').save(place / '1.jpg')
  image.save(place / '2.jpg', 'PNG')
  found = {}
  for decoder in ('pillow', 'simd'):
    batches = iterator(folder, decoder=decoder, **fields)
    found[decoder] = next(batches)['image'].astype(int)
    batches.close()
  difference = np.abs(found['simd'] - found['pillow'])
  assert difference.mean(axis=(1, 2, 3)).max() < 1
  assert not difference[1:3].any()  # CMYK and PNG stay with Pillow
  broken = place / '3.jpg'
  broken.write_bytes(broken.read_bytes()[:900])
  batches = iterator(folder, decoder='simd', **fields)
  with pytest.raises(ValueError, match=f'decode the image {broken}'):
    next(batches)
  batches.close()


def test_a_missing_decoder_is_refused(folder, monkeypatch):
  monkeypatch.setattr(simd, '_MODULES', ('no_such_module',))
  with pytest.raises(ValueError, match=r"pip install 'linearizer_jax\[simd\]'"):
    iterator(folder, decoder='simd')
  with pytest.raises(ValueError, match="'fast', expected 'pillow' or 'simd'"):
    iterator(folder, decoder='fast')


def test_bench_measures_each_loader(folder, tmp_path):
  out = tmp_path / 'large'
  bench.enlarge(folder, out, count=6, size=(50, 30))
  assert len(list(out.glob('train/*/*.jpg'))) == 6
  assert len(list(out.glob('val/*/*.jpg'))) == 2
  (some, *_) = out.glob('train/*/*.jpg')
  assert Image.open(some).size == (50, 30)
  data = config(out, crop_scale=(0.2, 1.0), flip=True)
  results = bench.compare(data, ['pillow'], 4, 0, images=80, rounds=2)
  assert results['pillow']['images_per_second'] > 1
  assert 0 < results['pillow']['cpu_ms'] < 1000
  first, top = results['pillow']['memory_mb']
  assert 0 <= first <= top < 50  # no workers; others may have helpers running
  # Fewer images than a batch are one batch.
  assert bench.compare(data, ['pillow'], 4, 0, images=1, rounds=1)


def test_verdict():
  assert bench.verdict(4.0, 300, 64, 0.25) == (
    'feeds 256 images/s, which take 2 cores'
  )
  assert bench.verdict(4.0, 200, 64, 0.25).startswith('starves')
