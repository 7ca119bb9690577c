"""Checksums of a checkpoint's files, which tell a damaged one from a good one.

Orbax reads zeroed bytes of an array without complaint. So the size and CRC-32
of every file are written beside the files before a checkpoint gets its name.
Left out is Orbax's `_CHECKPOINT_METADATA`, to which it adds the time afterwards
and without which it reads all the same.
"""

import json
import logging
import pathlib
import shutil
import zlib
from concurrent import futures

from linearizer_jax import hosts

FILE = 'checksums.json'
LEFT_OUT = '_CHECKPOINT_METADATA'

_log = logging.getLogger('linearizer_jax')


def saved_steps(directory):
  """Finished steps of a folder of checkpoints, in no order."""
  return [int(p.name) for p in directory.iterdir() if p.name.isdigit()]


def set_aside_damaged(directory):
  """Renames the newest steps to 'STEP.damaged' until one is whole.

  Args:
    directory: `<workdir>/<stage>/checkpoints`. Every process has to call.
  """
  directory = pathlib.Path(directory)
  if hosts.is_first() and directory.is_dir():
    for step in sorted(saved_steps(directory), reverse=True):
      found = damage(directory / str(step))
      if not found:
        break
      aside = directory / f'{step}.damaged'
      _log.warning(
        'the checkpoint of step %d is damaged: %s. It is now %s, and the one '
        'before it is used.',
        *(step, found, aside),
      )
      shutil.rmtree(aside, ignore_errors=True)
      (directory / str(step)).rename(aside)
  hosts.wait_for_all(f'checked {directory}')


def write_unnamed(directory, suffix):
  """`write` for the checkpoint that is about to lose the suffix of its name."""
  for path in pathlib.Path(directory).iterdir():
    if path.is_dir() and suffix in path.name:
      write(path)


def write(directory):
  """Writes `checksums.json` about the files under a directory."""
  directory = pathlib.Path(directory)
  files = [
    path
    for path in directory.rglob('*')
    if path.is_file() and path.name != LEFT_OUT
  ]
  with futures.ThreadPoolExecutor() as pool:
    sums = pool.map(_checksum, files)
    found = {
      path.relative_to(directory).as_posix(): [path.stat().st_size, checksum]
      for path, checksum in zip(files, sums, strict=True)
    }
  (directory / FILE).write_text(json.dumps(found, indent=1, sort_keys=True))


def damage(directory):
  """What is wrong with a directory, as text; None where nothing is.

  A directory without `checksums.json`, saved by something else, passes.
  """
  directory = pathlib.Path(directory)
  if not (directory / FILE).is_file():
    return None
  try:
    expected = json.loads((directory / FILE).read_bytes())
    expected = {directory / name: tuple(v) for name, v in expected.items()}
  except (ValueError, TypeError, AttributeError):  # not JSON, not our JSON
    return f'{FILE} cannot be read'
  for path, (size, _) in expected.items():
    name = path.relative_to(directory)
    if not path.is_file():
      return f'{name} is missing'
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} of {size} bytes'
  with futures.ThreadPoolExecutor() as pool:
    for path, checksum in zip(
      expected, pool.map(_checksum, expected), strict=True
    ):
      if checksum != expected[path][1]:
        return f'{path.relative_to(directory)} has other bytes than were saved'
  return None


def _checksum(path):
  """CRC-32 of a file, read in pieces."""
  value = 0
  with path.open('rb') as file:
    while piece := file.read(2**22):
      value = zlib.crc32(piece, value)
  return value
