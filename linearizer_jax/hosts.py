"""One run on many hosts: how its processes join, agree and stop together."""

import contextlib
import itertools
import os
import signal
import sys
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

# Compiling or reading may take one process so much longer than another.
TIMEOUT_MS = 3600 * 1000
_barriers = itertools.count()


def join(coordinator=None, num_processes=None, process_id=None):
  """Makes this process one of a run's, before JAX looks for devices.

  Without arguments the cluster is asked: TPU pods, SLURM, Open MPI, and
  whatever else `jax.distributed.initialize` knows. Where there is none, the
  process runs alone.

  Args:
    coordinator: 'HOST:PORT' of process 0, a free port there.
    num_processes: int, how many processes run.
    process_id: int in [0, num_processes).

  Raises:
    ValueError: some of the three are given and some are not, or out of range.
  """
  given = (coordinator, num_processes, process_id)
  if any(value is not None for value in given):
    if None in given:
      raise ValueError(
        f'--coordinator={coordinator}, --num_processes={num_processes} and '
        f'--process_id={process_id} belong together: give all three, or none '
        'on a TPU pod or under SLURM.'
      )
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'--process_id is {process_id}; with --num_processes={num_processes} '
        f'it must lie between 0 and {num_processes - 1}.'
      )
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return
  try:
    jax.distributed.initialize()
  except ValueError as error:
    if 'coordinator_address' not in str(error):
      raise


def is_first():
  """Whether this is process 0, which alone writes and speaks."""
  return jax.process_index() == 0


@contextlib.contextmanager
def ending_together():
  """An error in one process of several ends the run of all.

  Python's way out of a process waits for the others, which wait for this one in
  the next collective. It ends at once instead; the others then fail, or are
  ended by JAX when the heartbeat is missed, after 100 s.
  """
  try:
    yield
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    print(
      f'Process {jax.process_index()} of {jax.process_count()} ends here, and '
      'the others with it.',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)


def wait_for_all(name):
  """Returns once every process of the run has come here.

  Through the coordinator, not the devices: on CPU these wait 30 s at most.
  """
  if jax.process_count() > 1:
    multihost.get_barrier_sync_fn()(
      key=f'{name} {next(_barriers)}', timeout_ms=TIMEOUT_MS
    )


def as_first_sees(value):
  """What process 0 holds of an int or bool; every process has to ask."""
  if jax.process_count() == 1:
    return value
  seen = multihost_utils.broadcast_one_to_all(np.asarray(value))
  return type(value)(seen)


class StopSignal:
  """Whether the run is to stop: SIGTERM came to any of its processes.

  A process alone listens itself. Several leave the signal to JAX's preemption
  service, which listens for it on every host: a handler of ours would silence
  it. It tells all processes and picks a question that none has asked yet, so
  that all stop after the same update.
  """

  # Of the process, not of a stage: the next stage asks on, and a signal that
  # came at the end of one stops the next.
  _came = False
  _questions = itertools.count(1)

  def __init__(self):
    self._listens = jax.process_count() == 1
    if self._listens:
      self._old_handler = signal.signal(signal.SIGTERM, self._on_signal)

  def requested(self):
    """Every process has to ask after each update."""
    if not self._listens:
      question = next(StopSignal._questions)
      if multihost_utils.reached_preemption_sync_point(question):
        StopSignal._came = True
    return StopSignal._came

  def close(self):
    if self._listens:
      signal.signal(signal.SIGTERM, self._old_handler)

  @staticmethod
  def _on_signal(number, frame):
    del number, frame
    StopSignal._came = True
