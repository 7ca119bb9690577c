"""Tables whose rows are runs: from work directories to docs/results.md.

python -m linearizer_jax.results --runs=DIR --out=docs/results.md

Finished stages of the work directories become JSON lines beside `--out`, one a
number; the page is written from all of these. A run that still goes on can be
read too. Without `--runs` the page alone is written anew.

A line is {'table', 'scale', 'row', 'labels', 'seed', 'accuracy', 'updates',
'seconds'}, accuracy in percent, updates and seconds with those of the stages
that it started from; mIoU instead of accuracy in a table of segmentations. Or
it is {'scale', 'setup'}, a sentence about a scale, or {'table', 'scale',
'note'}, one about a table.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys

from linearizer_jax import checkpoint

# <kind>_<row>_s<seed>; a teacher is a row of its own.
STAGE = re.compile(
  r'(?P<kind>finetune|few|segment|upernet)_(?P<row>\w+)_s(?P<seed>\d+)'
)
TEACHER = re.compile(r'teacher\w*')
LABELS = {'finetune': 'all', 'few': '10%', 'segment': 'all', 'upernet': 'all'}
CLASSIFY = 'classify'  # stands for the first two, which share their tables
# The number of a table -> the rows that the others are compared with.
BASELINES = {'accuracy': ('none', 'both'), 'mIoU': ('random', 'none')}
KEY = ('table', 'scale', 'row', 'labels', 'seed')


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog='python -m linearizer_jax.results', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--runs', action='append', default=[], help='a work directory; repeatable'
  )
  parser.add_argument('--out', required=True, help='the page, a .md file')
  options = parser.parse_args(argv)
  path = pathlib.Path(options.out)
  try:
    lines = merge(
      read_lines(path.with_suffix('.jsonl')),
      *(collect(run) for run in options.runs),
    )
    if not any('row' in line for line in lines):
      raise ValueError(
        f'nothing to write: no --runs with a finished row, and no '
        f'{path.with_suffix(".jsonl")}.'
      )
  except (ValueError, OSError) as error:
    return f'{parser.prog}: {error}'
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  path.with_suffix('.jsonl').write_text(text)
  path.write_text(page(lines))
  print(f'Written to {path}, from {len(lines)} lines.')


def collect(workdir):
  """Lines of the finished stages of a work directory.

  A row that several tables share, such as the baselines, is given for each
  table that has a finished row of its own.

  Args:
    workdir: of a run whose `config.report.tables` lists (name, rows).

  Returns:
    A list of dicts, tables and rows in the order of the config.

  Raises:
    ValueError: no work directory, or the run is no table.
  """
  config = checkpoint.read_config(workdir)
  report = config['report']
  if not report.get('tables'):
    raise ValueError(
      f'{workdir} is no run of tables: its config.report.tables is empty. '
      'Start one with configs/imagenette.py:table=losses.'
    )
  done = {}
  for stage in config['stages']:
    path = checkpoint.stage_dir(workdir, stage) / 'result.json'
    if path.is_file():
      done[stage] = checkpoint.read_json(path)
  lines = {}  # kind -> row -> lines
  for stage, result in done.items():
    match = STAGE.fullmatch(stage)
    if match:
      row, kind = match['row'], match['kind']
      where = {'row': row, 'labels': LABELS[kind], 'seed': int(match['seed'])}
    elif TEACHER.fullmatch(stage):
      row, kind = stage, 'finetune'
      where = {'row': row, 'labels': 'all', 'seed': config['seed']}
    else:
      continue
    kind = CLASSIFY if kind in ('finetune', 'few') else kind
    metric = 'accuracy' if kind == CLASSIFY else 'mIoU'
    before = _before(config, stage, done)
    numbers = {metric: result[metric]}
    for name in ('steps', 'seconds'):
      total = result[name] + sum(other[name] for other in before)
      numbers['updates' if name == 'steps' else name] = total
    lines.setdefault(kind, {}).setdefault(row, []).append(where | numbers)
  found = [{'scale': report['scale'], 'setup': report['setup']}]
  for name, kind, rows in _tables(report, lines):
    place = {'table': name, 'scale': report['scale']}
    if note := report.get('notes', {}).get(name):
      found.append(place | {'note': note})
    for row in rows:
      found += [place | line for line in lines[kind].get(row, ())]
  return found


def _tables(report, lines):
  """(name, kind, rows) of every table with a finished row of its own.

  That is a row of no table before it, no teacher and no baseline, but where a
  kind has nothing else.
  """
  own = {}
  for kind, rows in lines.items():
    metric = 'accuracy' if kind == CLASSIFY else 'mIoU'
    students = {row for row in rows if not TEACHER.fullmatch(row)}
    own[kind] = students - set(BASELINES[metric]) or students
  found = []
  for name, rows in report['tables']:
    kind = report.get('segmentations', {}).get(name, CLASSIFY)
    if own.get(kind, set()) & set(rows):
      found.append((name, kind, rows))
      own[kind] -= set(rows)
  return found


def _before(config, stage, done):
  """Results of the stages that a stage started from, one after the other."""
  results = []
  while True:
    stage = config['per_stage'][stage].get('init', '').removeprefix('stage:')
    if stage not in done:
      return results
    results.append(done[stage])


def read_lines(path):
  """Lines of a JSON-lines file; none where there is no file."""
  path = pathlib.Path(path)
  if not path.is_file():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def merge(*sources):
  """All lines; of two for the same number the later one, in its place."""
  merged = {}
  for line in (line for lines in sources for line in lines):
    merged[tuple(line.get(name) for name in KEY)] = line
  return list(merged.values())


def summarise(lines):
  """Mean, deviation and paired differences of the rows of one table.

  Args:
    lines: of one table and scale.

  Returns:
    {row: {labels: {'accuracy', 'none', 'both'}}}, each a triple (mean, sample
    standard deviation, count): of the accuracy, and of its differences, seed by
    seed, from the baselines, where there are such. The deviation of one number
    is None. Of segmentations 'mIoU' and its baselines instead.
  """
  metric, cells = metric_of(lines), {}
  for line in lines:
    cell = cells.setdefault(line['row'], {}).setdefault(line['labels'], {})
    cell[line['seed']] = line[metric]

  def spread(values):
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values), deviation, len(values)

  found = {}
  for row, measures in cells.items():
    for labels, seeds in measures.items():
      cell = {metric: spread(list(seeds.values()))}
      for base in BASELINES[metric]:
        other = cells.get(base, {}).get(labels, {})
        pairs = [seeds[s] - other[s] for s in seeds if s in other]
        if pairs and row != base and not TEACHER.fullmatch(row):
          cell[base] = spread(pairs)
      found.setdefault(row, {})[labels] = cell
  return found


def metric_of(lines):
  """The number that the lines of one table hold."""
  return 'mIoU' if any('mIoU' in line for line in lines) else 'accuracy'


def page(lines):
  """The page, Markdown."""
  setups = {x['scale']: x['setup'] for x in lines if 'setup' in x}
  notes = {(x['table'], x['scale']): x['note'] for x in lines if 'note' in x}
  tables = {}
  for line in lines:
    if 'row' in line:
      tables.setdefault((line['table'], line['scale']), []).append(line)
  parts = [
    '# Results\n\nWritten by `python -m linearizer_jax.results` from the JSON '
    'lines beside this file; not to be edited.\n\nTest accuracy in percent, '
    'mIoU where a column says so: mean and sample standard deviation over the '
    'seeds. A difference is taken seed by seed from the same number of the row '
    'that its column names. Updates and seconds of training are those of one '
    'seed with all labels, with the stages that it started from, without '
    'compiling; rows may have run beside other work, so seconds are no '
    'benchmark.\n'
  ]
  for (name, scale), rows in tables.items():
    note = notes.get((name, scale))
    texts = [setups.get(scale, ''), *([note] if note else []), table(rows)]
    parts.append('\n\n'.join([f'## {name}, scale {scale}', *texts]) + '\n')
  return '\n'.join(parts)


def table(lines):
  """The Markdown table of one table and scale."""
  measures = [x for x in ('all', '10%') if any(x == y['labels'] for y in lines)]
  metric, header = metric_of(lines), ['row']
  baselines = BASELINES[metric]
  for labels in measures:
    header.append('mIoU' if metric == 'mIoU' else f'{labels} labels')
    header += [f'against {base}' for base in baselines]
  header += ['seeds', 'updates', 'seconds']
  text = [header, ['---'] * len(header)]
  for row, cells in summarise(lines).items():
    entry = [row.replace('_', ' ')]
    for labels in measures:
      cell = cells.get(labels, {})
      entry.append(_number(cell.get(metric)))
      entry += [_number(cell.get(base), '+') for base in baselines]
    every = [x for x in lines if x['row'] == row]
    whole = [x for x in every if x['labels'] == 'all']
    entry.append(str(len({x['seed'] for x in every})))
    for name in ('updates', 'seconds'):
      mean = statistics.mean(x[name] for x in whole) if whole else None
      entry.append('' if mean is None else f'{mean:.0f}')
    text.append(entry)
  return '\n'.join(f'| {" | ".join(entry)} |' for entry in text)


def _number(triple, sign=''):
  """'71.3 ± 0.4'; without the deviation where there is one seed."""
  if triple is None:
    return ''
  mean, deviation, _ = triple
  spread = '' if deviation is None else f' ± {deviation:.1f}'
  return f'{mean:{sign}.1f}{spread}'


if __name__ == '__main__':
  sys.exit(main())
