"""Faults of the data: broken images are counted, a stalled loader is named."""

import logging
import multiprocessing
import queue
import threading

from linearizer_jax.data import transforms

# The key under which a batch tells of broken images; no task sees it.
BROKEN = 'broken'
_NAMES_SHOWN = 3

_log = logging.getLogger('linearizer_jax')


def first_whole(source, index, make, limit, broken):
  """`make` of the first example at or after `index` that can be decoded.

  What stands in for a broken image so depends on the data alone: batches stay
  full, and the same ones come after a resume.

  Args:
    source: of `data.datasets`.
    index: of the example that is wanted.
    make: example -> result, drawing the same random numbers for each.
    limit: how many broken images to pass over; 0: none.
    broken: dict, to which name -> message of each is added.

  Raises:
    transforms.BrokenImageError: one more than `limit` is broken, or all are.
  """
  for tried in range(1, len(source) + 1):
    try:
      return make(source[index])
    except transforms.BrokenImageError as error:
      broken[source.name(index)] = str(error)
      if len(broken) > limit or tried == len(source):
        raise
    index = (index + 1) % len(source)


class Guard:
  """Takes batches from a loader, in time, and counts broken images.

  Args:
    config: `config.DataConfig`, with `max_broken` and `timeout_seconds`.
    names: step -> names of the images of its batch.
  """

  def __init__(self, config, names):
    self._config, self._names = config, names
    self.broken = {}  # name -> message, of different images

  def next(self, batches, step):
    """The next batch of the iterator `batches`, None at its end.

    Raises:
      TimeoutError: it took longer than `data.timeout_seconds`.
      ValueError: more than `data.max_broken` images are broken.
    """
    batch = self._in_time(lambda: next(batches, None), step)
    if batch is None:
      return None
    for name, message in batch.pop(BROKEN, {}).items():
      if name not in self.broken:
        self.broken[name] = message
        _log.warning(
          'broken image %d, of %d allowed by data.max_broken: %s',
          *(len(self.broken), self._config.max_broken, message),
        )
    if len(self.broken) > self._config.max_broken:
      raise transforms.BrokenImageError(
        f'{len(self.broken)} images are broken, data.max_broken allows '
        f'{self._config.max_broken}. The last one: '
        f'{list(self.broken.values())[-1]}'
      )
    return batch

  def _in_time(self, function, step):
    seconds = self._config.timeout_seconds
    if not seconds:
      return function()
    results = queue.SimpleQueue()

    def run():
      try:
        results.put((True, function()))
      except BaseException as error:  # raised below, in the caller's thread
        results.put((False, error))

    # A daemon: the interpreter may end while it hangs in a read.
    threading.Thread(target=run, daemon=True).start()
    try:
      done, result = results.get(timeout=seconds)
    except queue.Empty:
      # Workers that hang in a read would hold up closing the loader and the
      # end of this process. The run is over: all of its workers may go.
      for worker in multiprocessing.active_children():
        worker.kill()
      names = self._names(step)
      shown = ', '.join(names[:_NAMES_SHOWN])
      raise TimeoutError(
        f'No batch came for {seconds:g} s (data.timeout_seconds): batch {step} '
        f'is waited for, of {len(names)} images: {shown}'
        f'{", ..." if len(names) > _NAMES_SHOWN else ""}. See whether the disk '
        'that holds them answers; checkpoints written so far are kept. For '
        'slow data set data.num_workers or data.timeout_seconds higher.'
      ) from None
    if done:
      return result
    raise result
