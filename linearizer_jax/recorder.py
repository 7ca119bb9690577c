"""What a run says while it goes on: records, log lines, bar, faults."""

import collections
import logging
import math
import pathlib
import time

import jax

from linearizer_jax import hosts, metrics

_log = logging.getLogger('linearizer_jax')


class Recorder:
  """Everything a run says while it goes on: files, log lines, bar, faults.

  Args:
    workdir, stage: of the run.
    start_step, total_steps: updates taken before, and in all.
    batch_size: images in an update.
    profile_steps: (first update, how many) of a profiler trace.
    max_nonfinite_steps: updates left out before the run stops.

  Attributes:
    seconds: float, of training so far.
    flops: what a device spends in an update; `peak_flops` what it could in a
      second. Their share of the time is recorded where both are set.
  """

  # Updates the host may run ahead of the devices.
  LEAD = 2

  def __init__(
    self,
    workdir,
    stage,
    start_step,
    total_steps,
    batch_size,
    profile_steps=(0, 0),
    max_nonfinite_steps=0,
  ):
    first = hosts.is_first()
    self._stage, self._batch_size = stage, batch_size
    self._allowed = max_nonfinite_steps
    self.flops = self.peak_flops = None
    begin, count = profile_steps
    self._profile = range(begin, begin + count) if first else range(0)
    self._profiling = False
    self._events = pathlib.Path(workdir) / 'tensorboard' / stage
    self._writer = metrics.MetricWriter(workdir, stage, start_step, first)
    self._bar = metrics.progress_bar(
      stage, start_step, total_steps, batch_size, first
    )
    self._pending = collections.deque()
    self._values = {}
    self._stop = hosts.StopSignal()
    self.seconds = sum(
      record['interval_seconds']
      for record in metrics.read(workdir)
      if record['stage'] == stage and 'interval_seconds' in record
    )
    self._start_interval(start_step)

  def fetch(self, step, iterator):
    """The batch of update `step`, with a look at the clock."""
    if step in self._profile and not self._profiling:
      jax.profiler.start_trace(self._events)
      self._profiling = True
    before = time.perf_counter()
    batch = next(iterator)
    self._waited += time.perf_counter() - before
    return batch

  def add(self, step, values):
    """Takes an update's metrics, on the devices; looks at older ones."""
    self._pending.append((step, values))
    while len(self._pending) > self.LEAD:
      self._look(*self._pending.popleft())
    self._bar.update(self._batch_size)
    if self._profiling and step + 1 not in self._profile:
      self._end_profile()

  def check(self):
    """Waits for every update so far and looks at it."""
    while self._pending:
      self._look(*self._pending.popleft())

  def write(self, step, values):
    """Records the update `step`, with the time since the last record."""
    self.check()
    interval = time.perf_counter() - self._since
    updates = step - self._since_step
    self.seconds += interval
    timing = {
      'interval_seconds': interval,
      'images_per_second': updates * self._batch_size / interval,
      'data_wait_share': self._waited / interval,
    }
    if self.flops and self.peak_flops:
      spent = updates * self.flops / interval
      timing['flops_utilization'] = spent / self.peak_flops
    self._start_interval(step)
    self._writer.write(step, 'train', self._values | values | timing)
    if 'loss' in self._values:
      self._bar.set_postfix(loss=f'{self._values["loss"]:.4f}')

  def evaluation(self, step, values):
    """Records an evaluation; its time is not training time."""
    self._writer.write(step, 'eval', values)
    _log.info('%s: step %d: %s', self._stage, step, as_line(values))
    self._start_interval(step)

  def image(self, step, name, image):
    """Records a picture, uint8 (H, W, 3); its time is not training time."""
    self._writer.image(step, name, image)
    self._start_interval(step)

  def stop_requested(self):
    """Whether SIGTERM came, to any process of the run."""
    return self._stop.requested()

  def close(self):
    if self._profiling:
      self._end_profile()
    self._stop.close()
    self._bar.close()
    self._writer.close()

  def _start_interval(self, step):
    self._since, self._since_step = time.perf_counter(), step
    self._waited = 0.0

  def _end_profile(self):
    for _, values in self._pending:  # the devices lag behind
      jax.block_until_ready(values)
    jax.profiler.stop_trace()
    self._profiling = False
    _log.info('%s: profile in %s', self._stage, self._events)

  def _look(self, step, values):
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    skipped = step - round(values.pop('updates'))
    if self._allowed:
      values['skipped_steps'] = skipped
    for name in ('loss', 'gradient_norm'):
      if math.isfinite(values[name]):
        continue
      if not self._allowed or skipped > self._allowed:
        raise FloatingPointError(
          f'{name} is {values[name]} at step {step} of stage {self._stage!r}. '
          'The run stops; checkpoints saved before are good. Lower '
          'config.optimizer.learning_rate, set config.optimizer.clip_norm, '
          'change config.seed, or leave out such updates '
          '(config.optimizer.max_nonfinite_steps), and start again.'
        )
      _log.warning(
        '%s: %s is %s, step %d is left out, %d of %d that may be',
        *(self._stage, name, values[name], step, skipped, self._allowed),
      )
      break
    self._values = {k: v for k, v in values.items() if math.isfinite(v)}


def as_line(values):
  """Metrics as one short line."""
  return ', '.join(
    f'{name} {value:.4g}'
    for name, value in values.items()
    if isinstance(value, int | float)
    and not any(part in name for part in ('_stage', 'iou_'))
  )
