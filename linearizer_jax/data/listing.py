"""Lists the images of a folder once; later starts read the list.

Listing 1.28 million files takes minutes on a network disk. The list of a split
is kept as `<data_dir>/.<split>.index.npz`, or under `$XDG_CACHE_HOME` (else
`~/.cache`)`/linearizer_jax` where the data are read-only. It holds the time at
which each class folder last changed: adding, removing or renaming a file or
folder lists again. Deleting the file does no harm.
"""

import hashlib
import logging
import os
import pathlib
import tempfile
import time
import zipfile

import numpy as np

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
# A folder that changed this short ago may change once more within the same tick
# of its clock, which no time would show: its list is not kept.
_SETTLED_SECONDS = 2.0

_log = logging.getLogger('linearizer_jax')


def image_names(folder):
  """Sorted names of the image files in `folder`, hidden ones left out."""
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != '.'
    )


def list_images(root, split, classes):
  """Paths of all images of a split, from its index where that still holds.

  Args:
    root: pathlib.Path of the data.
    split: folder in `root`.
    classes: names of the folders in `root/split`, sorted.

  Returns:
    (paths, counts): bytes array (n,) of '<class>/<file>', sorted by class and
    file, and int64 (classes,), how many of them each class has.
  """
  changed = [os.stat(root / split / name).st_mtime_ns for name in classes]
  places = _places(root, split)
  for place in places:
    found = _read(place, classes, changed)
    if found:
      return found
  started = time.perf_counter()
  files = [image_names(root / split / name) for name in classes]
  paths = np.asarray(
    [
      os.fsencode(f'{name}/{file}')
      for name, members in zip(classes, files, strict=True)
      for file in members
    ],
    dtype=np.bytes_,
  )
  counts = np.asarray([len(members) for members in files], np.int64)
  kept = 'not kept: the folder changed a moment ago'
  if time.time() - max(changed) / 1e9 > _SETTLED_SECONDS:
    kept = _keep(places, classes, changed, paths, counts)
  seconds = time.perf_counter() - started
  _log.info(
    'listed %d images of %s in %.1f s; the list is %s',
    *(len(paths), root / split, seconds, kept),
  )
  return paths, counts


def _places(root, split):
  """Where the index of a split may be, the first writable one is taken."""
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  folder = str((root / split).resolve())
  name = hashlib.sha256(folder.encode()).hexdigest()[:16]
  return (
    root / f'.{split.replace("/", "_")}.index.npz',
    pathlib.Path(cache).expanduser() / 'linearizer_jax' / f'{name}.index.npz',
  )


def _read(place, classes, changed):
  """What `_keep` wrote, None where there is none or the folders differ."""
  try:
    with np.load(place) as kept:
      same = np.array_equal(kept['changed'], changed) and np.array_equal(
        kept['classes'], np.asarray(classes)
      )
      return (kept['paths'], kept['counts']) if same else None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def _keep(places, classes, changed, paths, counts):
  """Writes the index whole or not at all; says where."""
  for place in places:
    try:
      place.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=place.parent, prefix='.') as scratch:
        file = pathlib.Path(scratch, 'index.npz')
        np.savez(
          file, paths=paths, counts=counts, classes=classes, changed=changed
        )
        os.replace(file, place)
      return f'kept as {place}'
    except OSError as error:
      _log.debug('no index at %s: %s', place, error)
  return f'not kept: neither {places[0]} nor {places[1]} can be written'
