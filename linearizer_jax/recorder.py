"""What a run says while it goes on: records, log lines, bar, faults."""

import collections
import logging
import math
import signal
import time

import jax

from linearizer_jax import metrics

_log = logging.getLogger('linearizer_jax')


class Recorder:
  """Everything a run says while it goes on: files, log lines, bar, faults.

  Args:
    workdir, stage: of the run.
    start_step, total_steps: updates taken before, and in all.
    batch_size: images in an update.
  """

  # Updates the host may run ahead of the devices.
  LEAD = 2

  def __init__(self, workdir, stage, start_step, total_steps, batch_size):
    first = jax.process_index() == 0
    self._stage, self._batch_size = stage, batch_size
    self._writer = metrics.MetricWriter(workdir, stage, start_step, first)
    self._bar = metrics.progress_bar(
      stage, start_step, total_steps, batch_size, first
    )
    self._pending = collections.deque()
    self._values = {}
    self._stop = False
    self._old_handler = signal.signal(signal.SIGTERM, self._on_signal)
    self.seconds = sum(
      record['interval_seconds']
      for record in metrics.read(workdir)
      if record['stage'] == stage and 'interval_seconds' in record
    )
    self._since, self._since_step = time.perf_counter(), start_step

  def add(self, step, values):
    """Takes an update's metrics, on the devices; looks at older ones."""
    self._pending.append((step, values))
    while len(self._pending) > self.LEAD:
      self._look(*self._pending.popleft())
    self._bar.update(self._batch_size)

  def check(self):
    """Waits for every update so far and looks at it."""
    while self._pending:
      self._look(*self._pending.popleft())

  def write(self, step, values):
    """Records the update `step`, with the time since the last record."""
    self.check()
    now = time.perf_counter()
    interval = now - self._since
    images = (step - self._since_step) * self._batch_size
    self._since, self._since_step = now, step
    self.seconds += interval
    timing = {
      'interval_seconds': interval,
      'images_per_second': images / interval,
    }
    self._writer.write(step, 'train', self._values | values | timing)
    self._bar.set_postfix(loss=f'{self._values["loss"]:.4f}')

  def evaluation(self, step, values):
    """Records an evaluation; its time is not training time."""
    self._writer.write(step, 'eval', values)
    _log.info('%s: step %d: %s', self._stage, step, as_line(values))
    self._since = time.perf_counter()
    self._since_step = step

  def stop_requested(self, manager, step):
    """Whether SIGTERM came, to any process of the run."""
    if jax.process_count() > 1:
      return manager.reached_preemption(step)
    return self._stop

  def close(self):
    signal.signal(signal.SIGTERM, self._old_handler)
    self._bar.close()
    self._writer.close()

  def _look(self, step, values):
    self._values = {k: float(v) for k, v in jax.device_get(values).items()}
    for name in ('loss', 'gradient_norm'):
      if not math.isfinite(self._values[name]):
        raise FloatingPointError(
          f'{name} is {self._values[name]} at step {step} of stage '
          f'{self._stage!r}. The run stops; checkpoints saved before are good. '
          'Lower config.optimizer.learning_rate, set '
          'config.optimizer.clip_norm, or change config.seed, and start again.'
        )

  def _on_signal(self, number, frame):
    del number, frame
    self._stop = True


def as_line(values):
  """Metrics as one short line."""
  return ', '.join(
    f'{name} {value:.4g}'
    for name, value in values.items()
    if isinstance(value, int | float)
    and not any(part in name for part in ('_stage', 'iou_'))
  )
