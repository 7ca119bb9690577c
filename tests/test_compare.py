"""The comparison with peers: what can be tested without a GPU."""

import functools
import json
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linearizer_jax.kernels import bench
from linearizer_jax.kernels.compare import (
  counts,
  exact,
  jax_programs,
  mamba,
  run,
  table,
)
from linearizer_jax.kernels.compare.worker import Worker, WorkerError
from linearizer_jax.kernels.ssd import api
from linearizer_jax.kernels.ssd.shapes import SHAPES, Shape

TINY = Shape(batch=2, length=19, heads=4, head_dim=8, state_dim=4, groups=2)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Exact results of the tiny shape."""
  path = tmp_path_factory.mktemp('exact')
  exact.Exact(TINY, 'float32').write(path)
  return path


# ------------------------------------------------------------------- float64


def test_float64_is_the_recurrence(folder):
  """Against a loop that follows the equation, and the gradients of ours."""
  (x, dt, A, B, C, D), _ = bench.draw_inputs(TINY)
  x = x.reshape(2, 19, 4, 8).astype(np.float64)
  y = np.zeros_like(x)
  for b, h in np.ndindex(2, 4):
    state = np.zeros((8, 4))
    for t in range(19):
      state = np.exp(np.float64(dt[b, t, h]) * A[h]) * state
      state += np.outer(np.float64(dt[b, t, h]) * x[b, t, h], B[b, t, h // 2])
      y[b, t, h] = state @ C[b, t, h // 2] + D[h] * x[b, t, h]
  assert exact.errors(folder, [y])['y'] < 1e-14
  args, cotangent = bench.make_inputs(TINY, 'float32')
  ours = bench.forward_backward(TINY, 'reference')(args, cotangent)
  ours = [np.array(a) for a in jax.tree.leaves(ours)]
  found = exact.errors(folder, ours)
  assert list(found) == list(exact.OUTPUTS)
  assert 1e-9 < max(found.values()) < 2e-6
  ours[0] *= 1.5
  ours[1][0, 0] = np.nan
  found = exact.errors(folder, ours)
  assert found['y'] == pytest.approx(0.5, rel=1e-4)
  assert found['dx'] is None
  assert exact.errors(folder.parent / 'none', ours) == {}


# ------------------------------------------------------------------- workers


def test_a_worker_answers_fails_and_dies():
  made = functools.partial(
    types.SimpleNamespace, size=abs, sleep=time.sleep, die=os.abort
  )
  worker, slow, wrong = Worker(made), Worker(made), Worker(int, 'text')
  assert worker.ask('size', -2) == 2
  with pytest.raises(WorkerError, match='TypeError: bad operand'):
    worker.ask('size', 'text')
  assert worker.ask('size', -3) == 3  # goes on after an error
  with pytest.raises(WorkerError, match='exit code -6'):
    worker.ask('die')
  with pytest.raises(WorkerError):
    worker.ask('size', 1)
  with pytest.raises(WorkerError, match='ValueError: invalid literal'):
    wrong.ask('bit_count')
  slow.ask('size', 1)
  with pytest.raises(WorkerError, match='no answer in 0 s'):
    slow.ask('sleep', 60, timeout=0.2)
  for each in (worker, slow, wrong):
    each.close()


def test_samples_are_taken_in_turns():
  order, fails = [], iter([False, True])

  def good():
    order.append('good')
    return len(order)

  def bad():
    order.append('bad')
    if next(fails):
      raise WorkerError('gone')
    return 1.0

  found = run.in_turns({1: bad, 2: good}, seconds=0)
  assert order == ['bad', 'good', 'bad', 'good', 'good']
  assert found == {1: ([], 'gone'), 2: ([2, 4, 5], None)}
  assert len(run.in_turns({1: lambda: 1.0}, seconds=1e5)[1][0]) == 30


# --------------------------------------------------------------------- tables


def test_short_times_keep_their_digits():
  row = {'shape': 's', 'implementation': 'xla'}
  row |= {'temporary_mib': 1, 'mib_accessed': 2}
  text = bench.markdown([row | {'milliseconds': ms} for ms in (0.0512, 3174.1)])
  assert '| s | xla | 0.0512 | 1 | 2 | 3174.1 | 1 | 2 |' in text


def test_counts_of_a_shape():
  shape = SHAPES['base_224']
  forward = counts.bytes_moved('xla', shape, 'forward', 'bfloat16')
  assert forward / 2**20 == pytest.approx(157, abs=0.5)  # as XLA counts it
  # Tokens, inside chunks of 128, and the states; two FLOPs each.
  products = 128 * (64 + 1536) + 2 * 64 * 1536
  assert counts.flops('xla', shape, 'forward') == 2 * 128 * 198 * products
  assert counts.attention_heads(shape) == 12
  attention = counts.flops('attention, flash', shape, 'forward+backward')
  assert attention == 3 * 4 * 128 * 198**2 * 768
  row = {'program': 'xla', 'direction': 'forward', 'milliseconds': 1.0}
  peaks = {'peak_flops': 989e12, 'peak_bandwidth': 4.8e12}
  rates = counts.derived(row, shape, 'bfloat16', peaks)
  assert rates['gb_per_second'] == pytest.approx(forward / 1e6)
  assert rates['bandwidth_share'] == pytest.approx(forward / 4.8e9)
  rates = counts.derived(row, shape, 'float32', peaks)
  assert rates['flops_share'] is None
  row['milliseconds'] = None
  assert set(counts.derived(row, shape, 'float32', peaks).values()) == {None}
  assert counts.repeats(0.05) == 200
  assert counts.repeats(3.0) == 7
  assert counts.repeats(500.0) == 1


def test_the_page_says_how_much_faster():
  rows = [
    {
      'shape': 'base_224',
      'program': program,
      'direction': direction,
      'milliseconds': None if program == 'late' else ms * factor,
      'error': 2e-3,
      'reason': 'no answer in 9 s' if program == 'late' else None,
      'mib': 99.0,
    }
    for program, ms in (('pallas_gpu', 0.1), ('mamba_ssm', 0.25), ('late', 1))
    for direction, factor in (('forward', 1), ('forward+backward', 4))
  ]
  rows[2]['chunk_size'] = 128
  peaks = {'peak_flops': 989e12, 'peak_bandwidth': 4.8e12}
  shape = SHAPES['base_224']
  for row in rows:
    row |= counts.derived(row, shape, 'bfloat16', peaks)
  results = peaks | {
    'device': 'NVIDIA H200', 'platform': 'gpu', 'dtype': 'bfloat16',
    'command': 'python kernels/bench.py --all', 'jax': '0.0', 'rows': rows,
    'shapes': {'base_224': vars(shape), 'base_512': vars(SHAPES['base_512'])},
  }  # fmt: skip
  text = table.page(results)
  assert '| pallas_gpu | 0.1 | 2.0e-03 | 99 | 1646 (34%) | 203 (21%) |' in text
  assert '| mamba_ssm | 0.25 (Q 128) |' in text
  assert (
    'The speed of pallas_gpu against mamba_ssm: 2.50 times forward, 2.50 times '
    'forward+backward.'
  ) in text
  assert 'against late' not in text
  assert 'late, forward: no answer in 9 s.' in text
  assert 'KiB a token: 4 forward, 4 forward+backward' in text
  assert 'base_512' not in text
  assert 'their share of 4800 GB/s and 989 TFLOP/s.' in text
  text = table.page(results | {'dtype': 'float32'})
  assert 'their share of 4800 GB/s.' in text  # no peak of float32 is known


# ------------------------------------------------------------- the whole of it


class Local:
  """A `Worker` without a process."""

  def __init__(self, factory, *args):
    self._make = functools.partial(factory, *args)

  def ask(self, method, *args, timeout):
    assert timeout >= 0
    try:
      return getattr(self._make(), method)(*args)
    except Exception as error:
      raise WorkerError(f'{type(error).__name__}: {error}') from error

  def close(self):
    pass


class Kept(Local):
  """One that keeps what it has made."""

  def __init__(self, factory, *args):
    self._make = functools.cache(functools.partial(factory, *args))


def test_one_command(monkeypatch, tmp_path, capsys):
  """Two shapes on a CPU, with an implementation that cannot."""

  def cannot(*args, **options):
    raise NotImplementedError('this device cannot')

  written = []

  def write(results, options, real=run.write):
    real(results, options)
    written.append(len(json.loads(out.read_text())['rows']))

  out, page = tmp_path / 'bench.json', tmp_path / 'page.md'
  page.write_text('# Page\n')
  monkeypatch.setattr(run, 'Worker', Kept)
  monkeypatch.setattr(run, 'write', write)
  monkeypatch.setattr(bench, 'ROUNDS', (2, 2))
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'pallas_cpu', cannot)
  monkeypatch.setitem(SHAPES, 'tiny', TINY)
  monkeypatch.setitem(SHAPES, 'one', Shape(1, 3, 2, 8, 4))
  monkeypatch.setattr(
    sys, 'argv',
    ['bench.py', '--all', f'--out={out}', f'--docs={page}', '--seconds=1e5',
     '--shapes', 'tiny', 'one', '--implementations', 'pallas_cpu', 'xla_scan'],
  )  # fmt: skip
  bench.main()
  assert written == [4, 8]
  results = json.loads(out.read_text())
  assert results['dtype'] == 'float32'
  for row in results['rows']:
    if row['program'] == 'pallas_cpu':
      assert row['reason'] == 'NotImplementedError: this device cannot'
      assert row['milliseconds'] is None
      continue
    assert row['reason'] is None
    assert row['samples'] == 2
    assert row['milliseconds'] > 0
    assert row['error'] == max(row['errors'].values()) < 1e-5
    assert len(row['errors']) == (1 if row['direction'] == 'forward' else 7)
    assert row['gb_per_second'] > 0
    assert row['mib'] > 0
  text = page.read_text()
  assert text.startswith('# Page\n')
  assert (
    'bench.py --all --shapes tiny one --implementations pallas_cpu xla_scan '
    '--seconds 100000.0\n'
  ) in text
  assert text.count('<!-- begin scan cpu -->') == 1
  assert '**tiny**: batch 2, 19 tokens, 4 heads of 8, state 4' in text
  assert 'pallas_cpu, forward: NotImplementedError: this device' in text
  assert '| xla_scan |' in capsys.readouterr().out
  names = run.programs(
    'cpu', types.SimpleNamespace(implementations=None), TINY, 'float32', 8, ''
  )
  assert list(names) == ['pallas_cpu', 'reference', 'xla', 'xla_scan']


def test_implementations_in_one_process(monkeypatch, tmp_path, capsys):
  """Without --all; what needs too much memory is compiled alone."""
  out = tmp_path / 'bench.json'
  monkeypatch.setattr(bench, 'ROUNDS', (2, 2))
  monkeypatch.setitem(SHAPES, 'tiny', TINY)
  command = f'bench.py --shapes tiny --implementations reference --out={out}'

  def milliseconds(*more):
    monkeypatch.setattr(sys, 'argv', [*command.split(), *more])
    bench.main()
    results = json.loads(out.read_text())
    assert results['platform'] == 'cpu'
    for row in results['rows']:
      assert row['temporary_mib'] > 0
      assert row['gflop'] > 0
    return {r['direction']: r['milliseconds'] for r in results['rows']}

  times = milliseconds()
  assert tuple(times) == counts.DIRECTIONS
  assert all(time > 0 for time in times.values())
  assert '| tiny | reference | ' in capsys.readouterr().out
  assert set(milliseconds('--max_gib=1e-9').values()) == {None}
  assert '| tiny | reference | - | ' in capsys.readouterr().out


def measure_tiny(programs, seconds=1e5, hung=()):
  """{(program, direction): row} of the tiny shape."""
  rows = run.measure(
    'tiny',
    lambda folder: programs,
    'float32',
    {'peak_flops': None, 'peak_bandwidth': None},
    time.monotonic() + seconds,
    lambda timeout: None,
    hung,
  )
  return {(row['program'], row['direction']): row for row in rows}


def test_a_spent_budget_is_said(monkeypatch):
  monkeypatch.setattr(run, 'Worker', Local)
  monkeypatch.setitem(SHAPES, 'tiny', TINY)
  scan = jax_programs.Scan, 'xla', None, TINY, 'float32'
  rows = measure_tiny({'xla': scan}, seconds=-1)
  reasons = {row['reason'] for row in rows.values()}
  assert reasons == {'the budget of seconds is spent (--seconds)'}


class Breaks:
  """A `Worker` whose process ends with what it is told to break at."""

  def __init__(self, factory, *args):
    self.breaks, self.alive = args[0], True

  def ask(self, method, *args, timeout):
    self.alive &= (method, *args)[:2] != ('prepare', self.breaks)
    if not self.alive:
      raise WorkerError('no answer in 45 s')
    return 2.0 if method == 'sample' else {}

  def close(self):
    pass


def test_a_broken_backward_leaves_the_forward_its_time(monkeypatch):
  monkeypatch.setattr(run, 'Worker', Breaks)
  monkeypatch.setitem(SHAPES, 'tiny', TINY)
  forward, backward = counts.DIRECTIONS
  programs = {
    'pallas_gpu': (int, backward),
    'pallas_other': (int, forward),
    'mamba_ssm': (int, backward),
  }
  hung = set()
  for reason in ('no answer in 45 s', 'not run: it hung before'):
    rows = measure_tiny(programs, hung=hung)
    for name in ('pallas_gpu', 'mamba_ssm'):
      assert rows[name, forward]['milliseconds'] == 2
    assert rows['pallas_gpu', backward]['reason'] == reason
    assert rows['pallas_other', forward]['reason'] == reason
    before = rows['pallas_other', backward]['reason']
    assert before == 'not run: it hung before'
    # A peer may only have been slow.
    assert rows['mamba_ssm', backward]['reason'] == 'no answer in 45 s'
    assert hung == {('pallas_gpu', backward), ('pallas_other', forward)}


def test_wrong_arguments(monkeypatch, tmp_path, capsys):
  for arguments, message in (
    ([f'--mamba_ssm={tmp_path}'], 'has no mamba_ssm/ops/triton'),
    ([f'--docs={tmp_path}/none/page.md'], 'there is no folder for'),
  ):
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--all', *arguments])
    with pytest.raises(SystemExit):
      bench.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
  ('platform', 'message'),
  [
    ('tpu', '--all compares on a CPU or a GPU, this is a TPU'),
    ('cpu', '--mamba_ssm needs a GPU, and JAX has found none'),
  ],
)
def test_devices_that_cannot(monkeypatch, tmp_path, platform, message):
  monkeypatch.setattr(run, 'Worker', Local)
  monkeypatch.setattr(
    jax_programs.JaxProgram, 'about', lambda self: {'platform': platform}
  )
  monkeypatch.setattr(mamba, 'find', lambda folder: (folder, '2.2.5'))
  where = f'--out={tmp_path}/bench.json', f'--docs={tmp_path}/page.md'
  monkeypatch.setattr(
    sys, 'argv', ['bench.py', '--all', '--mamba_ssm=there', *where]
  )
  with pytest.raises(SystemExit, match=message):
    bench.main()


def test_what_is_wrong_is_not_timed(monkeypatch):
  class Gives(Breaks):
    def ask(self, method, *args, timeout):
      return {'errors': self.breaks} if method == 'prepare' else 1.0

  monkeypatch.setattr(run, 'Worker', Gives)
  monkeypatch.setitem(SHAPES, 'tiny', TINY)
  rows = measure_tiny({
    'good': (int, {'y': 2e-3, 'dx': 4e-3}),
    'bad': (int, {'y': 2e-3, 'dx': 0.5, 'dA': None}),
  })  # fmt: skip
  good, bad = rows['good', 'forward'], rows['bad', 'forward']
  assert (good['milliseconds'], good['error']) == (1.0, 4e-3)
  assert (bad['milliseconds'], bad['error']) == (None, None)
  assert bad['reason'] == ('wrong results: dx off by 0.5, dA not finite')


def test_which_programs_run_on_a_gpu():
  options = types.SimpleNamespace(implementations=None, mamba_ssm='there')
  found = run.programs('gpu', options, TINY, 'bfloat16', None, 'folder')
  assert 'reference' not in found
  assert 'pallas_tpu' not in found
  ours = [n for n in api.IMPLEMENTATIONS if n.endswith('gpu')]
  assert list(found) == [
    *ours,
    'xla',
    'mamba_ssm',
    'attention, cuDNN in JAX',
    'attention, flash in torch',
    'attention, cuDNN in torch',
    'xla_scan',
  ]


def test_several_sets_in_one_program(monkeypatch):
  monkeypatch.setattr(counts, 'SETS', 3)
  traced = []

  def trace(*args, real=bench.trace):
    traced.append(real(*args))
    return traced[-1]

  monkeypatch.setattr(bench, 'trace', trace)
  scan = jax_programs.Scan('reference', None, TINY, 'bfloat16')
  inputs, function = scan.inputs(), scan.function('forward')
  *_, last = results = scan._many(function, inputs)()
  assert len(results) == 3
  hides = jax_programs.JaxProgram, '_hides', lambda self, milliseconds: True
  monkeypatch.setattr(*hides)
  for seconds, calls in ((1e5, 3), (0, 1)):
    monkeypatch.setattr(counts, 'MANY_SECONDS', seconds)
    row = scan.prepare('forward', None)
    assert scan._calls['forward'][-1] == calls
    assert ('note' in row) == (calls == 1)
    assert scan.sample('forward') > 0
  # Between two calls nothing is fused, as between two that Python makes.
  assert str(traced[0].jaxpr).count('optimization_barrier') == 2
  moved = jax.tree.map(
    lambda a: jnp.roll(a, 2, axis=1) if a.ndim > 1 else a, inputs
  )
  expected = jax.jit(function)(*moved)
  np.testing.assert_array_equal(np.float32(last), np.float32(expected))
