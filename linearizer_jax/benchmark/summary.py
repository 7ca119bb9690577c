"""Results as a table: ratios, the crossover, the share of the FLOP ratio."""

import math

PAIRED = ('size', 'direction', 'load')


def comparisons(rows):
  """Each student beside its teacher, the n-th student beside the n-th teacher.

  Args:
    rows: from `run.run`.

  Returns:
    A list of dicts: 'student', 'teacher' (model names), 'variant' (of the
    teacher), 'size', 'pixels', 'direction', 'load', the two rows as
    'student_row' and 'teacher_row', and
      'speedup': images/s of the student over the teacher's,
      'flop_ratio': FLOPs of the teacher over the student's,
      'share': the first over the second,
    each None where a figure is missing.
  """
  students, teachers = (
    list(dict.fromkeys(r['model'] for r in rows if is_student(r) == wanted))
    for wanted in (True, False)
  )
  partner = dict(zip(teachers, students, strict=False))
  mine = {
    (r['model'], *(r[k] for k in PAIRED)): r for r in rows if is_student(r)
  }
  found = []
  for row in rows:
    key = (partner.get(row['model']), *(row[k] for k in PAIRED))
    if is_student(row) or key not in mine:
      continue
    own = mine[key]
    speedup = _ratio(own, row, 'images_per_second')
    arithmetic = _ratio(row, own, 'gflop_per_image')
    found.append(
      {k: row[k] for k in (*PAIRED, 'pixels', 'variant')}
      | {
        'student': own['model'],
        'teacher': row['model'],
        'student_row': own,
        'teacher_row': row,
        'speedup': speedup,
        'flop_ratio': arithmetic,
        'share': speedup and arithmetic and speedup / arithmetic,
      }
    )
  return found


def is_student(row):
  return row['variant'] == 'student'


def crossover(pairs):
  """Side of the square image from which on the student is faster, in pixels.

  Straight lines through the logarithms of side and speedup.

  Args:
    pairs: `comparisons` of one student, teacher, direction and load.

  Returns:
    float; 0.0 where the student is faster at every size timed, inf where at
    none of the largest; None where nothing was timed.
  """
  points = sorted(
    (math.sqrt(p['pixels']), p['speedup']) for p in pairs if p['speedup']
  )
  if not points:
    return None
  if points[-1][1] < 1:
    return math.inf
  for (low, a), (high, b) in zip(points[-2::-1], points[:0:-1], strict=True):
    if a < 1:
      share = -math.log(a) / (math.log(b) - math.log(a))
      return low * (high / low) ** share
  return 0.0


def markdown(results):
  """What a file of results says, as Markdown.

  Args:
    results: {'device', ..., 'command', 'rows'} as `__main__` writes it.

  Returns:
    Text: how it was measured, a table for each direction and batch, and below
    each where student and teacher cross.
  """
  lines = [_heading(results), '']
  pairs = comparisons(results['rows'])
  kinds = dict.fromkeys((p['direction'], p['load']) for p in pairs)
  for direction, load in kinds:
    chosen = [
      p for p in pairs if (p['direction'], p['load']) == (direction, load)
    ]
    batch = 'one image at a time' if load == 'one' else 'full batches'
    what = 'Training step' if direction == 'training' else 'Inference'
    lines += [f'**{what}, {batch}**', '', *_table(chosen), '']
    lines += [*_crossings(chosen), '']
  lines += _reasons(results['rows'])
  return '\n'.join(lines).strip()


def _heading(results):
  settings = [
    f'{results["device"]} ({results["platform"]}, {results["cores"]} cores)',
    *(
      f'{name} {results[name]}'
      for name in ('jax', 'torch', 'threads', 'dtype')
      if results.get(name)
    ),
  ]
  return (
    f'```bash\n{results["command"]}\n```\n\n{", ".join(settings)}. Medians of '
    'programs that run in turns. Memory is what the program holds in all, '
    'GFLOP those of the method (forward products, times three in training), '
    'share the speedup over the FLOP ratio.'
  )


def _table(pairs):
  header = (
    '| size | student | teacher | batch | student images/s | teacher images/s '
    '| speedup | FLOP ratio | share | student GiB | teacher GiB |'
  )
  counted = any('repeats' in p['student_row'] for p in pairs)
  header += ' repeats |' if counted else ''
  lines = [header, '|---' * (header.count('|') - 1) + '|']
  for p in pairs:
    own, other = p['student_row'], p['teacher_row']
    teacher = p['teacher'] + p['variant'].removeprefix('teacher')
    batches = dict.fromkeys((own['batch'], other['batch']))
    cells = [
      p['size'].replace('x', ' x '),
      p['student'],
      teacher,
      ', '.join(map(str, batches)),  # other patches, other batches
      _number(own['images_per_second']),
      _number(other['images_per_second']),
      _number(p['speedup']),
      _number(p['flop_ratio']),
      _number(p['share']),
      _number(own['memory_gib']),
      _number(other['memory_gib']),
    ]
    if counted:
      cells.append(_number(own['repeats']))
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def _crossings(pairs):
  """A sentence for each student and teacher."""
  groups = {}
  for p in pairs:
    key = p['student'], p['teacher'], p['variant']
    groups.setdefault(key, []).append(p)
  for (student, teacher, variant), group in groups.items():
    side = crossover(group)
    if side is None:
      continue
    where = {
      0.0: 'at every size measured',
      math.inf: 'at no size up to the largest measured',
    }.get(side, f'from {side:.0f} pixels a side on (interpolated)')
    note = variant.removeprefix('teacher')
    yield f'- {student} is faster than {teacher}{note} {where}.'


def _reasons(rows):
  missing = [row for row in rows if row['reason']]
  if not missing:
    return []
  return ['Not timed:', ''] + [
    f'- {row["direction"]}, {row["size"]}, batch {row["batch"]}, '
    f'{row["model"]} ({row["variant"]}): {row["reason"]}.'
    for row in missing
  ]


def _ratio(a, b, name):
  return a[name] / b[name] if a[name] and b[name] else None


def _number(value):
  """Three digits, or a dash."""
  if value is None:
    return '-'
  return f'{value:.0f}' if value >= 100 else f'{value:.3g}'
