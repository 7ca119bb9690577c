"""Pictures: loss curves, activation and label maps, speed and resolution.

python -m linearizer_jax.figures maps teacher=DIR:teacher student=DIR \\
  --images A.png B.png --blocks 2 5 8 11 --queries 5,7 9,3 --out maps.png
python -m linearizer_jax.figures segmentation random=DIR:STAGE both=DIR:STAGE \\
  --images A.jpg B.jpg --labels A.png B.png --names sky road --out labels.png
python -m linearizer_jax.figures tradeoff FILE.json --out tradeoff.png
"""

import argparse
import json
import pathlib
import sys

import numpy as np

from linearizer_jax import label_maps, maps, metrics


def loss_curves(workdir, path):
  """Draws the training loss of every stage of a run against its updates.

  A run without updates, of evaluations alone, gets no file.

  Args:
    workdir: folder of the run, with metrics.jsonl.
    path: PNG file to write.
  """
  from matplotlib import figure

  curves = {}
  for record in metrics.read(workdir):
    if record['split'] == 'train':
      stage = curves.setdefault(record['stage'], {})
      for name, value in record.items():
        if name in ('loss', 'match', 'predict', 'feature', 'logit', 'class'):
          stage.setdefault(name, []).append((record['step'], value))
  if not curves:
    return
  columns = min(3, len(curves))
  rows = -(-len(curves) // columns)
  canvas = figure.Figure(figsize=(4 * columns, 3 * rows), layout='constrained')
  axes = canvas.subplots(rows, columns, squeeze=False).ravel()
  for axis, (stage, lines) in zip(axes, curves.items(), strict=False):
    for name, points in lines.items():
      if name != 'loss' or len(lines) != 2:  # one term is the loss
        # Without a mark, a single value is not to be seen.
        axis.plot(
          *zip(*points, strict=True),
          marker='.' if len(points) == 1 else None,
          label=name,
          linewidth=1,
        )
    axis.set(title=stage, xlabel='update', ylabel='training loss')
    axis.locator_params(axis='x', integer=True)
    axis.set_yscale('log')
    plain_numbers(axis.yaxis)
    axis.legend(frameon=False, fontsize=8)
  for axis in axes[len(curves) :]:
    axis.set_axis_off()
  canvas.savefig(path, dpi=120)


# Of Okabe and Ito: told apart with any colour vision, and in grey by the marks.
STUDENTS = ('#0072B2', '#56B4E9', '#009E73')
TEACHERS = ('#D55E00', '#E69F00', '#CC79A7')
MARKS = 'os^'


def tradeoff(files, path, *, load='full', accuracy=None):
  """Draws speed and memory against resolution, and accuracy against speed.

  Args:
    files: JSON files of `python -m linearizer_jax.benchmark`.
    path: file to write; its ending says what kind.
    load: 'full' batches or 'one' image at a time.
    accuracy: {model: percent}; adds a panel of accuracy against the images/s of
      inference at the smallest size.

  Raises:
    ValueError: nothing was timed with this load, or a model of `accuracy` was
      not.
  """
  from matplotlib import figure

  lines = _lines(files, load)
  batch = 'one image' if load == 'one' else 'full batch'
  # Beside what was timed there may be programs that were only compiled.
  directions = list(
    dict.fromkeys(
      row['direction']
      for rows in lines.values()
      for row in rows
      if row['images_per_second']
    )
  )
  has_memory = any(r['memory_gib'] for rows in lines.values() for r in rows)
  panels = [
    (direction, field, unit)
    for direction in directions
    for field, unit in (
      ('images_per_second', 'images/s'),
      ('memory_gib', f'GiB, {batch}'),
    )
    if field == 'images_per_second' or has_memory
  ]
  columns = 1 + has_memory
  rows = len(directions) + bool(accuracy)
  canvas = figure.Figure(
    figsize=(4.4 * columns, 3.1 * rows + 0.7), layout='constrained'
  )
  axes = canvas.subplots(rows, columns, squeeze=False)
  for axis, panel in zip(axes.ravel(), panels, strict=False):
    _resolution_panel(axis, lines, *panel)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  canvas.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=2 if columns > 1 else 1,
    frameon=False,
    fontsize=9,
  )
  if accuracy:
    _accuracy_panel(axes[-1, 0], lines, accuracy)
    for axis in axes[-1, 1:]:
      axis.set_axis_off()
  canvas.savefig(path, dpi=150)


def _lines(files, load):
  """{(label, colour, style, mark, model): rows} of files of results."""
  results = [json.loads(pathlib.Path(file).read_text()) for file in files]
  lines, seen = {}, {True: [], False: []}
  for file, result in zip(files, results, strict=True):
    if not {'framework', 'rows'} <= set(result):
      raise ValueError(f'{file} is no file of `linearizer_jax.benchmark`.')
    where = f', {result["framework"]} {result["platform"]}'
    for row in result['rows']:
      # A batch that is full with one image was timed once.
      if row['load'] != load and not (row['batch'] == 1 and load == 'one'):
        continue
      student = row['variant'] == 'student'
      name = row['model'], where
      if name not in seen[student]:
        seen[student].append(name)
      n = seen[student].index(name) % len(MARKS)
      note = row['variant'].removeprefix('teacher').removeprefix('student')
      label = row['model'] + note + (where if len(results) > 1 else '')
      style = ':' if note else '-' if student else '--'
      color = (STUDENTS if student else TEACHERS)[n]
      key = label, color, style, MARKS[n], row['model']
      lines.setdefault(key, []).append(row)
  if not any(r['images_per_second'] for rows in lines.values() for r in rows):
    names = ', '.join(map(str, files))
    raise ValueError(f'{names}: nothing was timed with --load={load}.')
  return lines


def _resolution_panel(axis, lines, direction, field, unit):
  """One quantity of one direction against the side of the image."""
  ticks = {}
  for (label, color, style, mark, _), rows in lines.items():
    points = sorted(
      (row['pixels'] ** 0.5, row[field])
      for row in rows
      if row['direction'] == direction and row[field]
    )
    for row in rows:
      height, width = row['size'].split('x')
      name = height if height == width else f'{height} x {width}'
      ticks[row['pixels'] ** 0.5] = name
    axis.plot(
      *(zip(*points, strict=True) if points else ((), ())),
      color=color,
      linestyle=style,
      marker=mark,
      markersize=5,
      markerfacecolor='white' if style == ':' else color,
      label=label,
    )
  title = 'inference' if direction == 'inference' else 'training step'
  axis.set(xscale='log', yscale='log', title=title, ylabel=unit)
  axis.set_xlabel('image, pixels a side')
  axis.set_xticks(
    list(ticks),
    ticks.values(),
    rotation=45,
    ha='right',
    rotation_mode='anchor',
    fontsize=8,
  )
  axis.set_xticks([], minor=True)
  plain_numbers(axis.yaxis)
  axis.grid(alpha=0.3)


def _accuracy_panel(axis, lines, accuracy):
  """Accuracy against images/s of inference at the smallest size."""
  timed = [
    (row, key)
    for key, rows in lines.items()
    for row in rows
    if row['direction'] == 'inference' and row['images_per_second']
  ]
  if not timed:
    raise ValueError('--accuracy needs inference to be timed, none was.')
  smallest = min(row['pixels'] for row, _ in timed)
  timed = [pair for pair in timed if pair[0]['pixels'] == smallest]
  missing = set(accuracy) - {row['model'] for row, _ in timed}
  if missing:
    raise ValueError(
      f'--accuracy names {sorted(missing)}, which were not timed at '
      f'{smallest**0.5:.0f} pixels.'
    )
  for row, (label, color, style, mark, model) in timed:
    if model not in accuracy or style == ':':
      continue
    at = row['images_per_second'], accuracy[model]
    axis.plot(*at, mark, color=color, markersize=8)
    axis.annotate(
      label, at, (0, 8), textcoords='offset points', ha='center', fontsize=8
    )
  axis.margins(0.45)
  axis.set(ylabel='accuracy, %', xlabel=f'images/s at {smallest**0.5:.0f} px')
  axis.grid(alpha=0.3)


def plain_numbers(axis):
  """Labels of a logarithmic axis as 1, 2, 5, 10 instead of powers.

  An axis too short for two of them has evenly spaced ones.
  """
  from matplotlib import ticker

  low, high = axis.get_view_interval()
  axis.set_major_locator(
    ticker.LogLocator(subs=(1, 2, 5))
    if high > 6 * low
    else ticker.MaxNLocator(4)
  )
  axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axis.set_minor_formatter(ticker.NullFormatter())


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog='python -m linearizer_jax.figures', description=__doc__.split('\n')[0]
  )
  commands = parser.add_subparsers(dest='command', required=True)
  draw = commands.add_parser('maps', help='activation maps of networks')
  draw.add_argument(
    'networks',
    nargs='+',
    metavar='NAME=SOURCE',
    help='anything load() takes: a work directory (SOURCE:STAGE for one of its '
    'stages), an exported folder, weights, the name of a teacher',
  )
  draw.add_argument('--images', nargs='+', required=True, help='image files')
  draw.add_argument(
    '--blocks', type=int, nargs='+', default=[-1], help='negative from the end'
  )
  draw.add_argument(
    '--queries',
    type=numbers,
    nargs='+',
    metavar='ROW,COLUMN',
    help='patches of the first network; the brightest one by default',
  )
  draw.add_argument(
    '--size', type=int, help='pixels; the first network decides by default'
  )
  draw.add_argument('--out', default='maps.png', help='file to write')

  labels = commands.add_parser(
    'segmentation', help='images, their labels and what runs make of them'
  )
  labels.add_argument(
    'runs',
    nargs='+',
    metavar='NAME=SOURCE',
    help='work directories of segmentations, SOURCE:STAGE for one stage',
  )
  labels.add_argument('--images', nargs='+', required=True, help='image files')
  labels.add_argument(
    '--labels', nargs='+', required=True, help='their label files, in order'
  )
  labels.add_argument(
    '--names', nargs='+', default=[], help='of the classes; ids unless given'
  )
  labels.add_argument('--out', default='labels.png', help='file to write')

  trade = commands.add_parser('tradeoff', help='speed, memory, resolution')
  trade.add_argument('files', nargs='+', help='JSON files of the benchmark')
  trade.add_argument('--load', choices=('full', 'one'), default='full')
  trade.add_argument(
    '--accuracy', type=percent, nargs='+', default=[], metavar='MODEL=PERCENT'
  )
  trade.add_argument('--out', default='tradeoff.png', help='file to write')
  options = parser.parse_args(argv)
  try:
    if options.command == 'maps':
      _maps_of_sources(options)
    elif options.command == 'segmentation':
      label_maps.draw_label_maps(
        {
          name: label_maps.load_run(*source)
          for name, source in map(_named, options.runs)
        },
        *(options.images, options.labels, options.out, options.names),
      )
    else:
      accuracy = dict(options.accuracy)
      tradeoff(options.files, options.out, load=options.load, accuracy=accuracy)
  except (ValueError, OSError, ImportError) as error:
    return f'{parser.prog} {options.command}: {error}'
  print(f'Written to {options.out}.')


def numbers(text):
  """'3,4' -> (3, 4)."""
  row, column = text.split(',')
  return int(row), int(column)


def percent(text):
  """'vit=84.7' -> ('vit', 84.7)."""
  model, value = text.split('=')
  return model, float(value)


def _named(text):
  """'NAME=SOURCE:STAGE' -> (NAME, (SOURCE, STAGE)); the stage may be None."""
  name, _, source = text.partition('=')
  if not source:
    raise ValueError(f'{text!r} is no NAME=SOURCE.')
  stage = None
  if not pathlib.Path(source).exists() and ':' in source:
    source, _, stage = source.rpartition(':')
  return name, (source, stage)


def _maps_of_sources(options):
  """Loads networks and pictures, and draws their maps."""
  from PIL import Image

  from linearizer_jax.convert import load

  networks, sizes, crops = {}, [], []
  for text in options.networks:
    name, (source, stage) = _named(text)
    model, variables, preprocess = load.load(source, stage=stage, num_classes=0)
    stats = preprocess.mean, preprocess.std
    networks[name] = model, variables['params'], stats
    sizes.append(preprocess.image_size)
    crops.append(preprocess.eval_crop)
  size = (options.size,) * 2 if options.size else sizes[0]
  neutral = load.Preprocessing(size, (0.0,) * 3, (1 / 255,) * 3, crops[0])
  pictures = []
  for file in options.images:
    with Image.open(file) as picture:
      pictures.append(neutral(picture)[0].round().astype(np.uint8))
  maps.activation_maps(
    np.stack(pictures),
    networks,
    options.out,
    blocks=options.blocks,
    queries=options.queries,
  )


if __name__ == '__main__':
  sys.exit(main())
