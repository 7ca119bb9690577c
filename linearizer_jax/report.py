"""What a finished run leaves: a table, summary.json, curves and maps."""

import logging
import pathlib

import ml_collections
import numpy as np

from linearizer_jax import checkpoint, figures, maps, models, results
from linearizer_jax.data import pipeline

_log = logging.getLogger('linearizer_jax')


def write(config, workdir):
  """Writes summary.json and figures of a run, and prints its table.

  Args:
    config: the run's resolved config, a dict. `report.rows` lists (name,
      stages) in order; of the stages the one with the highest `report.metric`
      counts. Without rows each stage is one, with its loss.
    workdir: folder of the run, all of whose stages are done.

  Returns:
    The summary, a dict: {row: value, 'seconds': {stage: float}}. None for a run
    of tables, which are printed: `results` writes them.
  """
  workdir = pathlib.Path(workdir)
  options = reported(config)
  if options['tables']:
    print(results.page(results.collect(workdir)))
    return None
  done = {
    stage: checkpoint.read_json(
      checkpoint.stage_dir(workdir, stage) / 'result.json'
    )
    for stage in config['stages']
  }
  metric = options['metric'] or 'loss'
  rows = dict(options['rows'] or [(stage, (stage,)) for stage in done])
  summary = {}
  for row, stages in rows.items():
    # A distillation has no accuracy: its loss stands in the table. Features
    # that are only probed have neither.
    found = [done[s].get(metric, done[s].get('loss')) for s in stages]
    if None not in found:
      summary[row] = max(found)
  if options['nearest_neighbour']:
    stage = checkpoint.resolve_stage(config, options['nearest_neighbour'])
    summary['nearest_neighbour'] = nearest_neighbour(stage['data'])
  seconds = {stage: result['seconds'] for stage, result in done.items()}
  summary['seconds'] = seconds
  checkpoint.write_json(workdir / 'summary.json', summary)

  figures.loss_curves(workdir, workdir / 'losses.png')
  if options['maps']:
    _draw_maps(config, workdir, dict(options['maps']), workdir / 'maps.png')
  shown = [contents(config, workdir)]
  if len(summary) > 1:  # beside the seconds
    shown.insert(0, table(metric, summary, rows))
  print(*shown, sep='\n\n')
  return summary


def reported(config):
  """`config.report` without what is about stages that the run leaves out."""
  ran, options = config['stages'], config['report']
  rows = {
    name: tuple(stage for stage in stages if stage in ran)
    for name, stages in dict(options['rows']).items()
  }
  nearest = options['nearest_neighbour']
  return options | {
    'rows': {name: stages for name, stages in rows.items() if stages},
    'maps': [(name, stage) for name, stage in options['maps'] if stage in ran],
    'nearest_neighbour': nearest if nearest in ran else '',
  }


def table(metric, summary, rows):
  """The rows of a summary as text, with the seconds of training behind."""
  lines = [f'{"":20}{metric:>10}{"seconds":>10}']
  for row, value in summary.items():
    if row == 'seconds':
      continue
    took = sum(summary['seconds'][stage] for stage in rows.get(row, ()))
    took = f'{took:10.0f}' if row in rows else f'{"-":>10}'
    lines.append(f'{row.replace("_", " "):20}{value:10.2f}{took}')
  return '\n'.join(lines)


def contents(config, workdir):
  """Where everything of a run lies, as text; what is not there is left out."""
  places = {
    'work directory': workdir,
    'summary': workdir / 'summary.json',
    'metrics': workdir / 'metrics.jsonl',
    'losses': workdir / 'losses.png',
    'activation maps': workdir / 'maps.png',
  }
  for stage in config['stages']:
    folder = checkpoint.stage_dir(workdir, stage) / 'checkpoints'
    if any(folder.glob('*')):  # an evaluation saves none
      places[f'checkpoints, {stage}'] = folder
  lines = [f'{k:30} {path}' for k, path in places.items() if path.exists()]
  if (workdir / 'tensorboard').is_dir():
    lines.append(f'{"curves":30} tensorboard --logdir={workdir}/tensorboard')
  return '\n'.join(lines)


def nearest_neighbour(data):
  """Test accuracy in percent of 1-NN on pixels, on the same few labels.

  Args:
    data: a config's `data` section, whose label budget holds.
  """
  from sklearn.neighbors import KNeighborsClassifier

  def pixels(split):
    batches = list(
      pipeline.make_eval_batches(data, batch_size=256, split=split)
    )
    images, labels, valid = (
      np.concatenate([batch[name] for batch in batches])
      for name in ('image', 'label', 'valid')
    )
    return images[valid].reshape(valid.sum(), -1) / 255, labels[valid]

  config = pipeline.DataConfig(**data)
  images, labels = pixels(config.train_split)
  classifier = KNeighborsClassifier(n_neighbors=1).fit(images, labels)
  return 100 * classifier.score(*pixels(config.eval_split))


def _draw_maps(config, workdir, networks, path):
  """Activation maps of the networks of some stages, side by side."""
  loaded = {}
  for name, stage in networks.items():
    params, info = checkpoint.load_params(workdir, stage=stage)
    stage_config = ml_collections.ConfigDict(info['config'])
    role = 'student'
    if stage_config.task != 'distill':
      role = stage_config.train_role
    model, stats = models.from_config(stage_config, role, num_classes=0)
    params = {
      k: v for k, v in params.items() if k not in ('head', 'mask_token')
    }
    loaded[name] = (model, params, stats)
  first = next(iter(networks.values()))
  data = checkpoint.resolve_stage(config, first)['data']
  batch = next(iter(pipeline.make_eval_batches(data, batch_size=4)))
  maps.activation_maps(batch['image'][batch['valid']], loaded, path)
