"""Where a compiled TPU program's memory traffic comes from.

XLA's cost analysis gives one number for a program. The text of the optimised
program says which instruction reads and writes which arrays, whether they lie
in HBM, and from which line of a model the instruction came.
"""

import collections
import math
import re

_COMPUTATION = re.compile(r'^(?:ENTRY )?%(\S+) \(.*\{$')
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)'
)
_ARRAY = re.compile(r'\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?')
# Instructions that move nothing themselves, and the ends of asynchronous ones.
_FREE = re.compile(
  'parameter|constant|tuple|get-tuple-element|bitcast|after-all|'
  'while|conditional|call|partition-id|replica-id|.*-done'
)
_FREE_CALLS = ('ConcatBitcast', 'AllocateBuffer')
# Parts of a name that are no module.
_WRAPPERS = ('checkpoint', 'rematted_computation', 'shard_map')


def by_source(text, depth=3):
  """Bytes between HBM and a chip's compute units, by what causes them.

  An instruction moves its operands and its results, except what XLA placed in
  VMEM; a slice moves what it keeps. The body of a loop counts once per
  iteration. Arrays count without the padding of their tiles, and an operand
  of which a fusion picks some rows counts whole.

  Args:
    text: `compiled.as_text()` of a program for a TPU.
    depth: modules that a source is named by, such as
      'Adventurer/layers/mixer'; numbers of blocks are left out. What has no
    name of its own, as a move to VMEM, has that of the array it moves.

  Returns:
    {(source, kind): bytes}, largest first; kind is 'forward', 'backward',
    'copy' (a change of layout alone), 'move' (between HBM and VMEM alone) or
    'kernel' (a Pallas call).
  """
  computations, entry = _parse(text)
  found = collections.Counter()

  def walk(computation, times):
    types, sources = {}, {}
    for name, result, opcode, rest in computations[computation]:
      operands = re.findall(r'%([^\s,)]+)', rest.split(')')[0])
      inherited = (sources[o] for o in operands if sources.get(o))
      types[name] = result
      sources[name] = _source(rest, depth) or next(inherited, None)
      if opcode == 'while':
        trips = re.search(r'known_trip_count":\{"n":"(\d+)', rest)
        body = re.search(r'body=%([^,\s]+)', rest).group(1)
        walk(body, times * int(trips.group(1) if trips else 1))
      elif opcode == 'call':
        walk(re.search(r'to_apply=%([^,\s]+)', rest).group(1), times)
      elif not _FREE.fullmatch(opcode) and not any(
        f'"{target}"' in rest for target in _FREE_CALLS
      ):
        moved = _moved(opcode, result, [types.get(o, '') for o in operands])
        source = sources[name] or 'without a name'
        found[source, _kind(opcode, rest)] += times * moved

  walk(entry, 1)
  return dict(found.most_common())


def table(sources, rows=20):
  """Lines of the largest of [source, kind, bytes], in GB."""
  lines = [
    f'  {value / 1e9:8.2f} GB  {kind:8}  {source}'
    for source, kind, value in sources[:rows]
  ]
  total = sum(value for *_, value in sources)
  return [*lines, f'  {total / 1e9:8.2f} GB  in all']


def _parse(text):
  """{computation: [(name, result type, opcode, rest)]} and the entry's name."""
  computations, entry, lines = {}, None, []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      lines = computations.setdefault(head.group(1), [])
      entry = head.group(1) if line.startswith('ENTRY') else entry
    elif instruction := _INSTRUCTION.match(line):
      lines.append(instruction.groups())
  return computations, entry


def _moved(opcode, result, operands):
  """Bytes of HBM that an instruction reads and writes."""
  if opcode == 'slice-start':  # ((source), destination, context)
    source, kept = _arrays(result)[:2]
    return (_bytes(source, everywhere=True) > 0) * _bytes(kept, True)
  if opcode == 'copy-start':  # (destination, source, context)
    return sum(map(_bytes, _arrays(result)))
  if opcode in ('slice', 'dynamic-slice'):
    return 2 * sum(map(_bytes, _arrays(result)))
  return sum(_bytes(a) for t in [result, *operands] for a in _arrays(t))


def _arrays(shape):
  return [m.groups() for m in _ARRAY.finditer(shape)]


def _bytes(array, everywhere=False):
  """Bytes of an array in HBM, 0 for one in another memory."""
  dtype, dims, layout = array
  if not everywhere and 'S(' in (layout or ''):
    return 0
  bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype).group())
  return math.prod(int(d) for d in dims.split(',') if d) * bits // 8


def _source(rest, depth):
  """'Adventurer/layers/mixer' from an instruction's op_name, or None."""
  name = re.search(r'op_name="([^"]*)"', rest)
  if not name:
    return None
  if '/' not in name.group(1):  # an argument: state.params['student']...
    return name.group(1).split('[')[0]
  parts = []
  for part in name.group(1).split('/')[:-1]:
    part = re.sub(r'^(?:(?!jit)\w+\()+|\)+$', '', part)  # of jvp, transpose
    if not part.startswith('jit(') and part not in _WRAPPERS:
      parts.append(re.sub(r'_\d+$', '', part))
  return '/'.join(parts[:depth]) or 'the step'


def _kind(opcode, rest):
  if 'tpu_custom_call' in rest:
    return 'kernel'
  if opcode in ('copy-start', 'slice-start'):
    return 'move'
  if opcode in ('copy', 'transpose'):
    return 'copy'
  return 'backward' if 'transpose(' in rest else 'forward'
