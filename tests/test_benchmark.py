"""The benchmark on small networks, its tables, its pictures."""

import functools
import json
import math
import time
import types

import jax
import pytest

from linearizer_jax import models
from linearizer_jax.benchmark import (
  __main__,
  distill,
  flops,
  programs,
  run,
  summary,
)
from linearizer_jax.kernels import bench, sections
from linearizer_jax.kernels.compare.worker import WorkerError

STUDENT, TEACHER = 'adventurer_base_patch16', 'vit_base_patch16'
SMALL = {
  'adventurer_tiny_patch16': dict(width=64, depth=1, head_dim=16),
  'vit_tiny_patch16': dict(width=48, depth=1, num_heads=3),
}


def row(model, variant, side, speed, **more):
  """A row as `programs.measure` gives it."""
  known = programs.Case(
    model, variant, None, (side, side), 2, 'full', 'inference', 'float32'
  ).row()
  figures = {
    'milliseconds': speed and 2e3 / speed,
    'images_per_second': speed,
    'memory_gib': 1.5,
    'xla_gflop_per_image': 1.0,
    'device_peak_gib': None,
    'reason': None if speed else 'does not fit: 9.0 GiB of 4.0 GiB',
  }
  return known | figures | more


@pytest.fixture
def results():
  """Results of three sizes; the teacher falls behind between two of them."""
  rows = []
  for side, own, other in ((224, 50, 100), (448, 20, 10), (896, 4, None)):
    rows.append(row(STUDENT, 'student', side, own))
    rows.append(row(TEACHER, 'teacher', side, other))
  return {
    'framework': 'jax',
    'device': 'Thing 1',
    'platform': 'gpu',
    'cores': 4,
    'jax': '0.0',
    'dtype': 'float32',
    'command': 'python -m linearizer_jax.benchmark',
    'rows': rows,
  }


@pytest.mark.parametrize(
  ('size', 'expected'),
  [
    ((224, 224), 0.86),
    ((448, 448), 0.97),
    ((512, 512), 1.01),
    ((1024, 1024), 1.56),
    ((1024, 2048), 2.29),
    ((2048, 2048), 3.76),
  ],
)
def test_flop_ratios(size, expected):
  """Counted once by hand, to one percent."""
  student, teacher = models.create_model(STUDENT), models.create_model(TEACHER)
  ratio = flops.forward(teacher, size) / flops.forward(student, size)
  assert ratio == pytest.approx(expected, rel=0.012)


def test_flops_of_a_vit_are_those_published():
  """17.6 GFLOP of multiply-adds at 224 pixels, the number of ViT-B/16."""
  teacher = models.create_model(TEACHER, num_classes=1000)
  assert flops.forward(teacher, (224, 224)) / 2e9 == pytest.approx(17.6, 0.01)


def test_speedup_share_and_crossover(results):
  pairs = summary.comparisons(results['rows'])
  assert [p['speedup'] for p in pairs] == [0.5, 2.0, None]
  for pair in pairs[:2]:
    assert pair['share'] * pair['flop_ratio'] == pytest.approx(pair['speedup'])
  # 0.5 and 2 on a logarithmic scale: 1 lies half way between the sides.
  assert summary.crossover(pairs) == pytest.approx(224 * math.sqrt(2))
  assert summary.crossover(pairs[:1]) == math.inf
  assert summary.crossover(pairs[1:]) == 0.0
  assert summary.crossover(pairs[2:]) is None


def test_the_page_holds_what_the_file_holds(results, tmp_path, capsys):
  file, page = tmp_path / 'out.json', tmp_path / 'page.md'
  file.write_text(json.dumps(results))
  page.write_text('# Before\n')
  for _ in range(2):  # the second time replaces
    assert not __main__.main([f'--table={file}', f'--docs={page}'])
  text = page.read_text()
  assert text.startswith('# Before\n')
  assert text.count('<!-- begin benchmark jax gpu -->') == 1
  assert '| 448 x 448 | adventurer_base_patch16 | vit_base_patch16 | 2 ' in text
  results['rows'][1]['batch'] = 8  # of a teacher with larger patches
  assert '| vit_base_patch16 | 2, 8 | 50 | 100 |' in summary.markdown(results)
  assert 'from 317 pixels a side on (interpolated)' in text
  assert 'does not fit: 9.0 GiB of 4.0 GiB' in text
  sections.rewrite(page, 'benchmark jax gpu', 'other')
  assert '448' not in page.read_text()
  page.write_text('<!-- begin a -->\n')
  with pytest.raises(ValueError, match='1 of <!-- begin a --> and 0 of'):
    sections.rewrite(page, 'a', 'text')


def test_teachers_get_their_fastest_attention():
  found = run.variants([STUDENT, TEACHER], 'gpu', 'bfloat16')
  assert found == [
    (STUDENT, 'student', None),
    (TEACHER, 'teacher', 'cudnn'),
    (TEACHER, run.NAIVE, 'xla'),
  ]
  assert run.variants([TEACHER], 'cpu', 'float32') == [
    (TEACHER, 'teacher', 'xla')
  ]
  with pytest.raises(ValueError, match="no model 'nothing'"):
    run.variants(['nothing'], 'cpu', 'float32')


@pytest.fixture
def small(monkeypatch):
  """The tiny models made small enough to compile in a moment."""
  create = models.create_model

  def create_small(name, **fields):
    return create(name, **SMALL[name] | fields)

  monkeypatch.setattr(models, 'create_model', create_small)


class Clock:
  """Time, which passes in calls of networks alone."""

  now = 0.0

  def monotonic(self):
    return self.now


@pytest.mark.parametrize(('seconds', 'timed'), [(30, 2), (29, 1), (5, 0)])
def test_rounds_end_before_the_deadline(monkeypatch, seconds, timed):
  """Two calls to see how long one takes, one to warm up, three rounds."""
  clock = Clock()
  monkeypatch.setattr(programs, 'time', clock)

  def program(cost):
    def call():
      clock.now += cost

    figures = {'memory_gib': 1.0, 'xla_gflop_per_image': 1.0}
    return types.SimpleNamespace(
      figures=figures, device=jax.devices()[0], start=lambda: call
    )

  made = {
    programs.Case(
      STUDENT, 'student', None, (224, 224), batch, 'full', 'training', 'float32'
    ): program(cost)
    for batch, cost in ((1, 1), (8, 4))
  }
  rows = programs.measure(made, 0, seconds, limit_gib=2)
  assert [r['reason'] is None for r in rows] == [timed > 0, timed > 1]
  # What is found to take too long has been called twice.
  assert clock.now == {2: 30, 1: 6 + 8, 0: 2 + 8}[timed]


def test_a_host_lends_half_its_memory(monkeypatch):
  """Not every system knows SC_AVPHYS_PAGES."""
  device = types.SimpleNamespace(memory_stats=lambda: None)
  known = {'SC_PHYS_PAGES': 1000, 'SC_PAGE_SIZE': 4096}
  monkeypatch.setattr(programs.os, 'sysconf', known.__getitem__)
  assert programs.memory_limit(device) == 500 * 4096


def test_what_runs_and_what_does_not(small):
  device = jax.devices()[0]
  measure = functools.partial(
    run.run, list(SMALL), [(32, 48)], device=device, dtype='float32', tokens=6
  )
  rows = measure(seconds=1e5)  # no busy machine spends it
  # A full batch is one image here: no case is there twice.
  assert [(r['direction'], r['variant']) for r in rows] == [
    ('inference', 'student'),
    ('inference', 'teacher'),
    ('training', 'student'),
    ('training', 'teacher'),
  ]
  for r in rows:
    assert r['reason'] is None
    assert r['images_per_second'] == pytest.approx(1e3 / r['milliseconds'])
    assert r['memory_gib'] > 0
    # XLA counts what this file counts, and the rest besides.
    assert r['xla_gflop_per_image'] > 0.6 * r['gflop_per_image']
  assert all('seconds is spent' in r['reason'] for r in measure(seconds=0))
  with pytest.raises(ValueError, match='30 x 30 pixels cannot be cut'):
    run.run(['vit_tiny_patch16'], [(30, 30)], device=device,
            dtype='float32', seconds=0)  # fmt: skip

  case = programs.Case(
    'vit_tiny_patch16', 'teacher', None, (32, 32), 1, 'one', 'inference',
    'float32',
  )  # fmt: skip
  program = programs.Program(case, device)
  late = time.monotonic() + 1e5
  (refused,) = programs.measure({case: program}, 0, late, limit_gib=1e-9)
  assert refused['reason'].startswith('does not fit')
  assert refused['memory_gib'] > 0

  def fail():
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory\nmore')

  program.start = fail
  (failed,) = programs.measure({case: program}, 0, late, limit_gib=1)
  assert failed['reason'].endswith('RESOURCE_EXHAUSTED: out of memory')


class Network:
  """Takes a millisecond for each MFLOP."""

  def __init__(self, clock, module, size):
    self.clock, self.gflop = clock, flops.forward(module, size) / 1e9

  def eval(self):
    return self

  def __call__(self, images):
    self.clock.now += self.gflop * len(images)


# A call of each: one image and eight of 32 pixels, of 128 pixels.
@pytest.mark.parametrize(
  ('budget', 'timed'), [(0, 1), (0.1, 2), (0.95, 3), (1.01, 4), (9, 4)]
)
def test_torch_keeps_its_budget(small, monkeypatch, budget, timed):
  """In units of a call of everything."""
  pytest.importorskip('torch')
  from linearizer_jax.benchmark import torch_cpu

  clock = Clock()
  monkeypatch.setattr(torch_cpu, 'time', clock)
  monkeypatch.setattr(torch_cpu, 'as_torch', functools.partial(Network, clock))
  sizes = [(32, 32), (128, 128)]
  modules = [models.create_model(name, num_classes=1000) for name in SMALL]
  costs = [
    batch * sum(flops.forward(m, size) for m in modules) / 1e9
    for size in sizes
    for batch in (1, 8)
  ]
  found = torch_cpu.run(list(SMALL), sizes, seconds=budget * sum(costs))
  assert clock.now <= 1.001 * max(budget * sum(costs), costs[0])
  rows = found['rows']
  assert sum(r['reason'] is None for r in rows) == 2 * timed
  for r in rows:
    if r['reason']:
      assert r['reason'].endswith('s, more than is left')
      assert r['images_per_second'] is None
    else:
      assert r['repeats'] >= 1
      assert r['milliseconds'] == pytest.approx(
        r['batch'] * r['gflop_per_image'] * 1e3
      )
  if budget == 9:  # what is left over is spent on repeats
    assert clock.now > 4 * sum(costs)
    assert rows[0]['repeats'] == torch_cpu.MOST
    assert f'| {rows[-1]["repeats"]} |' in summary.markdown(
      found | {'command': ''}
    )


def test_torch_student_against_a_plain_vit(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch')
  from linearizer_jax.benchmark import torch_cpu

  module = models.create_model('vit_tiny_patch16', num_classes=1000)
  network = torch_cpu.as_torch(module, (224, 224))
  # As timm's vit_tiny_patch16_224.
  assert sum(p.numel() for p in network.parameters()) == 5_717_416
  assert '30 x 30 pixels cannot be cut' in __main__.main(
    ['--torch', '--sizes=30']
  )
  out = tmp_path / 'torch.json'
  monkeypatch.setattr(torch_cpu, 'MOST', 1)
  assert not __main__.main(
    ['--torch', '--sizes=32', '--seconds=1e5', f'--out={out}',
     f'--models={",".join(SMALL)}']
  )  # fmt: skip
  found = json.loads(out.read_text())
  assert found['torch'] == torch.__version__
  assert [(r['model'], r['batch']) for r in found['rows']] == [
    (model, batch) for batch in (1, 8) for model in SMALL
  ]
  assert all(r['images_per_second'] > 0 for r in found['rows'])
  assert all(r['repeats'] == 1 for r in found['rows'])
  assert out.with_suffix('.png').stat().st_size > 10_000


def test_wrong_arguments(capsys):
  assert '512x' in __main__.main(['--sizes=512x'])
  assert "'0x224'" in __main__.main(['--sizes=0x224'])
  for arguments, message in (
    (['--torch', '--dtype=bfloat16'], '--dtype would have no effect: --torch'),
    (['--batch=8'], '--batch would have no effect: they go with --distill'),
  ):
    assert message in __main__.main(arguments)
  assert 'no such file' in __main__.main(['--table=/none.json']).lower()


def test_the_step_of_a_distillation(tmp_path, monkeypatch, capsys):
  """The real step at a smoke size; a scan that cannot is a row."""
  load = distill.load_config

  def load_small(path):
    config = load(path)
    config.student.depth = config.teacher.depth = 1
    config.distill.num_stages = 1
    return config

  monkeypatch.setattr(distill, 'load_config', load_small)
  monkeypatch.setattr(distill.chips, 'peak_flops', lambda device: 1e12)
  out, page = tmp_path / 'distill.json', tmp_path / 'page.md'
  command = [
    '--distill=configs/distill_base.py:smoke', '--batch=2', '--seconds=1e5',
    '--implementations=xla_scan,pallas_tpu', f'--out={out}',
  ]  # fmt: skip
  monkeypatch.setattr(bench, 'ROUNDS', (2, 2))
  jax.config.update('jax_disable_most_optimizations', True)  # compiles sooner
  try:
    assert not __main__.main(command)
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
  results = json.loads(out.read_text())
  timed, failed = results['rows']
  assert timed['reason'] is None
  assert timed['images_per_second'] == pytest.approx(
    2e3 / timed['milliseconds']
  )
  assert timed['flops_utilization'] == pytest.approx(
    timed['gflop_per_image'] * timed['images_per_second'] / 1e3
  )
  # XLA counts what this file counts, and the rest besides.
  assert 0.6 < timed['xla_gflop_per_image'] / timed['gflop_per_image'] < 2
  assert 'Error' in failed['reason']
  assert failed['images_per_second'] is None
  assert not __main__.main([f'--table={out}', f'--docs={page}'])
  text = page.read_text()
  assert '<!-- begin distillation jax cpu -->' in text
  assert '## Distillation step, jax on CPU' in text
  assert f'- pallas_tpu: {failed["reason"]}.' in text


def test_a_step_that_hangs_leaves_the_others(monkeypatch):
  asked = []

  class Fake:
    def __init__(self, factory):
      assert factory is distill.Alone

    def ask(self, method, path, options, timeout):
      asked.append((options['seconds'], timeout))
      if options['implementations'] == ['xla']:
        raise WorkerError('no answer in 9 s')
      return [{'implementation': 'xla_scan', 'images_per_second': 5.0}]

    def close(self):
      asked.append('closed')

  monkeypatch.setattr(distill, 'Worker', Fake)
  results = distill.run_apart(
    'configs/distill_base.py:smoke',
    device=jax.devices()[0],
    batch=2,
    implementations=['xla', 'xla_scan'],
    seconds=100,
  )
  failed, timed = results['rows']
  assert failed['reason'] == 'no answer in 9 s'
  assert timed['images_per_second'] == 5
  (child, whole), closed, (_, rest), _ = asked
  assert closed == 'closed'
  assert child < whole < 50 < rest < 100  # what one leaves, the next may take
  assert '- xla: no answer in 9 s.' in distill.markdown(
    results | {'command': '', 'rows': [failed]}
  )


def test_distillations_that_are_none():
  assert 'there is no file' in __main__.main(['--distill=none.py'])
  assert "expected 'distill'" in __main__.main(
    ['--distill=configs/finetune_imagenet.py:smoke']
  )
  assert '--sizes would have no effect' in __main__.main(
    ['--distill=configs/distill_base.py', '--sizes=32']
  )


def test_the_products_of_a_distillation():
  config = distill.load_config('configs/distill_base.py')
  config.batch_size, config.student.ssd_implementation = 256, 'xla'
  row = distill.Case(config, jax.devices()[0]).row()
  student = models.create_model(STUDENT)
  teacher = models.create_model('clip_base_patch16')
  expected = 3 * flops.forward(student, (224, 224))
  expected += flops.forward(teacher, (224, 224))
  assert row['gflop_per_image'] == pytest.approx(expected / 1e9, rel=0.01)
