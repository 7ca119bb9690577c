"""The results of a comparison as Markdown."""

from linearizer_jax.kernels.compare import counts

_HEADER = (
  '| program | forward ms | error | MiB | GB/s | TFLOP/s '
  '| fwd+bwd ms | error | MiB | GB/s | TFLOP/s |'
)


def page(results):
  """The section of docs/benchmarks.md.

  Args:
    results: of `run.run`.
  """
  versions = [
    f'{name} {results[name]}'
    for name in ('jax', 'torch', 'triton', 'mamba_ssm')
    if results.get(name)
  ]
  where = results['platform'].upper()
  return '\n'.join(
    [
      f'## The SSD scan and its peers on a {where}',
      '',
      f'```bash\n{results["command"]}\n```',
      '',
      f'{results["device"]}, {results["dtype"]}, {", ".join(versions)}. '
      f'{_notes(results)}',
      '',
      shapes(results),
    ]
  )


def shapes(results):
  """A table for each shape that was measured, and what it says."""
  parts = []
  for name, sizes in results['shapes'].items():
    rows = [row for row in results['rows'] if row['shape'] == name]
    if not rows:
      continue
    title = (
      f'**{name}**: batch {sizes["batch"]}, {sizes["length"]} tokens, '
      f'{sizes["heads"]} heads of {sizes["head_dim"]}, state '
      f'{sizes["state_dim"]}'
    )
    lines = [title, '', *_table(rows)]
    below = [*_ratios(rows), *_memory(rows, sizes), *_reasons(rows)]
    parts.append('\n'.join([*lines, '', *below]).strip())
  return '\n\n'.join(parts)


def _notes(results):
  peaks = ''
  if results['peak_bandwidth']:
    peaks = (
      f', in brackets their share of {results["peak_bandwidth"] / 1e9:.0f} GB/s'
    )
    if results['dtype'] == 'bfloat16':
      peaks += f' and {results["peak_flops"] / 1e12:.0f} TFLOP/s'
  return (
    'Medians of programs that run in turns, each in a process of its own; '
    'short ones run many times in one compiled program or CUDA graph. Error '
    'is the relative L2 distance to float64 on the same inputs, of y forward '
    'and the largest of y and all gradients with backward. MiB is the peak '
    'beside the arguments. GB/s counts every argument and result once, TFLOP/s '
    f'the products of the method (scan: chunks of {counts.CHUNK}){peaks}.'
  )


def _table(rows):
  columns = _HEADER.count('|') - 1
  lines = [_HEADER, '|---' * columns + '|']
  for program in dict.fromkeys(row['program'] for row in rows):
    own = {r['direction']: r for r in rows if r['program'] == program}
    cells = [program]
    for direction in counts.DIRECTIONS:
      row = own[direction]
      chunk = row.get('chunk_size')
      ms = _number(row['milliseconds'])
      cells += [
        f'{ms} (Q {chunk})' if chunk else ms,
        '-' if row['error'] is None else f'{row["error"]:.1e}',
        _number(row.get('mib')),
        _share(row, 'gb_per_second', 'bandwidth_share'),
        _share(row, 'tflop_per_second', 'flops_share'),
      ]
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def _ratios(rows):
  """How much faster the kernels are than everything else."""
  times = {(r['program'], r['direction']): r['milliseconds'] for r in rows}
  names = list(dict.fromkeys(r['program'] for r in rows))
  for kernel in (n for n in names if n.startswith('pallas')):
    for other in names:
      pairs = [
        (times[other, d], times[kernel, d], d) for d in counts.DIRECTIONS
      ]
      said = [f'{a / b:.2f} times {d}' for a, b, d in pairs if a and b]
      if other != kernel and said:
        yield f'- The speed of {kernel} against {other}: {", ".join(said)}.'


def _memory(rows, sizes):
  tokens = sizes['batch'] * sizes['length']
  for kernel in dict.fromkeys(r['program'] for r in rows):
    each = [
      f'{1024 * r["mib"] / tokens:.3g} {r["direction"]}'
      for r in rows
      if r['program'] == kernel and r.get('mib') is not None
    ]
    if kernel.startswith('pallas') and each:
      yield f'- {kernel} takes, in KiB a token: {", ".join(each)}.'


def _reasons(rows):
  for row in rows:
    for field in ('reason', 'note'):
      if row.get(field):
        yield f'- {row["program"]}, {row["direction"]}: {row[field]}.'


def _share(row, name, share):
  text = _number(row[name])
  return text if row[share] is None else f'{text} ({100 * row[share]:.0f}%)'


def _number(value):
  """Three digits, or a dash."""
  if value is None:
    return '-'
  return f'{value:.0f}' if value >= 100 else f'{value:.3g}'
