"""Where numbers go: metrics.jsonl, TensorBoard events, a progress bar."""

import json
import os
import pathlib
import sys

import tqdm


class MetricWriter:
  """Writes scalars of one stage to JSON lines and TensorBoard events.

  Records of steps after `start_step`, left by a run that was stopped after its
  last checkpoint, are removed, so that each step stands once.

  Args:
    workdir: folder of the run; `metrics.jsonl` and `tensorboard/` lie there.
    stage: name of the stage, a field of every record.
    start_step: updates taken before.
    active: False on all processes but the first, which then write nothing.
  """

  def __init__(self, workdir, stage, start_step, active=True):
    self._stage, self._active = stage, active
    if not active:
      return
    # Here, because it imports torch where torch is installed.
    import tensorboardX

    workdir = pathlib.Path(workdir)
    path = workdir / 'metrics.jsonl'
    kept = [
      json.dumps(record) + '\n'
      for record in read(workdir)
      if record['stage'] != stage or record['step'] <= start_step
    ]
    partial = path.with_name(path.name + '.partial')
    partial.write_text(''.join(kept))
    os.replace(partial, path)  # whole or the old one, whenever it is killed
    self._lines = path.open('a')
    self._events = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard' / stage), purge_step=start_step + 1
    )

  def write(self, step, split, values):
    """Adds one record: {'stage', 'step', 'split', **values}, floats."""
    if not self._active:
      return
    record = {'stage': self._stage, 'step': step, 'split': split, **values}
    self._lines.write(json.dumps(record) + '\n')
    self._lines.flush()
    for name, value in values.items():
      self._events.add_scalar(f'{split}/{name}', value, step)

  def image(self, step, name, image):
    """Adds a picture, uint8 (H, W, 3), to the TensorBoard events."""
    if self._active:
      self._events.add_image(name, image, step, dataformats='HWC')

  def close(self):
    if self._active:
      self._lines.close()
      self._events.close()


def read(workdir):
  """Records of metrics.jsonl in order; a torn last line is left out."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  records = []
  for line in path.read_text().splitlines() if path.is_file() else ():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break  # the process was killed while it wrote
  return records


def progress_bar(stage, start_step, total_steps, batch_size, active=True):
  """A bar with images/s and time left; silent where there is no terminal."""
  return tqdm.tqdm(
    total=total_steps * batch_size,
    initial=start_step * batch_size,
    desc=stage,
    unit='image',
    unit_scale=True,
    dynamic_ncols=True,
    disable=not active or not sys.stderr.isatty(),
  )
