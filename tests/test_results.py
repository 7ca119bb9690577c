"""Tables whose rows are runs: their stages, resuming, and the page."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import imagenette
from linearizer_jax import checkpoint, results, train

ROOT = pathlib.Path(__file__).parent.parent


def line(row, seed, accuracy, labels='all', **more):
  return {
    'table': 'losses',
    'scale': 'cpu',
    'row': row,
    'labels': labels,
    'seed': seed,
    'accuracy': accuracy,
    'updates': 30,
    'seconds': 2.0,
  } | more


LINES = [
  {'scale': 'cpu', 'setup': 'Small.'},
  line('teacher', 0, 80.0, updates=99),
  line('none', 0, 60.0),
  line('none', 1, 64.0),
  line('none', 2, 62.0),
  line('both', 0, 63.0, seconds=4.0),
  line('both', 1, 65.0, seconds=6.0),
  line('both', 0, 50.0, '10%'),
  line('only_matching', 2, 61.0),
]


def test_means_deviations_and_paired_differences():
  found = results.summarise(LINES[1:])
  assert found['teacher'] == {'all': {'accuracy': (80.0, None, 1)}}
  # Sample deviation: squares of 2, 0, 2 over 2.
  assert found['none']['all']['accuracy'] == (62.0, 2.0, 3)
  both = found['both']['all']
  assert both['accuracy'] == (64.0, pytest.approx(2**0.5), 2)
  # 63 - 60 and 65 - 64: of the seeds that both have.
  assert both['none'] == (2.0, pytest.approx(2**0.5), 2)
  assert 'both' not in both
  assert found['both']['10%'] == {'accuracy': (50.0, None, 1)}
  assert found['only_matching']['all']['none'] == (-1.0, None, 1)
  assert 'both' not in found['only_matching']['all']  # of no seed in common


def test_the_page_has_a_row_for_each_row():
  page = results.page(LINES)
  assert '## losses, scale cpu\n\nSmall.\n' in page
  rows = [x for x in page.splitlines() if x.startswith('| ')]
  assert rows[0] == (
    '| row | all labels | against none | against both | 10% labels | against '
    'none | against both | seeds | updates | seconds |'
  )
  assert rows[2:] == [
    '| teacher | 80.0 |  |  |  |  |  | 1 | 99 | 2 |',
    '| none | 62.0 ± 2.0 |  | -2.0 ± 1.4 |  |  |  | 3 | 30 | 2 |',
    '| both | 64.0 ± 1.4 | +2.0 ± 1.4 |  | 50.0 |  |  | 2 | 30 | 5 |',
    '| only matching | 61.0 | -1.0 |  |  |  |  | 1 | 30 | 2 |',
  ]


def test_new_lines_replace_old_ones_of_the_same_number():
  new = line('none', 1, 65.0)
  merged = results.merge(LINES, [new, line('none', 3, 1.0)])
  assert merged[: len(LINES)] == [new if x == LINES[3] else x for x in LINES]
  assert merged[len(LINES) :] == [line('none', 3, 1.0)]


def finish(workdir, stage, accuracy, steps):
  directory = checkpoint.stage_dir(workdir, stage)
  directory.mkdir()
  checkpoint.write_json(
    directory / 'result.json',
    {'accuracy': accuracy, 'loss': 1.0, 'seconds': 10.0, 'steps': steps},
  )


def test_work_directories_become_the_page(tmp_path, capsys):
  """Several tables share a directory and the rows they have in common."""
  run, out = tmp_path / 'run', tmp_path / 'docs' / 'results.md'
  losses = imagenette.get_config('table=losses,seeds=1').to_dict()
  checkpoint.claim_workdir(run, losses)
  finish(run, 'teacher', 80.0, 5)
  finish(run, 'finetune_none_s0', 60.0, 3)
  finish(run, 'distill_both_s0', 1.0, 2)
  finish(run, 'finetune_both_s0', 63.0, 1)
  command = [f'--runs={run}', f'--out={out}']
  assert not results.main(command)
  lines = results.read_lines(out.with_suffix('.jsonl'))
  assert lines[0]['scale'] == 'cpu'
  assert lines[1:] == [
    line('teacher', 0, 80.0, updates=5, seconds=10.0),
    line('none', 0, 60.0, updates=3, seconds=10.0),
    line('both', 0, 63.0, updates=3, seconds=20.0),
  ]
  flips = imagenette.get_config('table=flips,seeds=1').to_dict()
  checkpoint.claim_workdir(run, flips)
  finish(run, 'few_flips_never_s0', 40.0, 1)
  assert not results.main(command)
  page = out.read_text()
  assert page.count('| both | 63.0 | +3.0 |') == 2
  assert '| flips never |  |  |  | 40.0 |' in page
  # The page alone, from the lines that are kept.
  out.unlink()
  assert not results.main([f'--out={out}'])
  assert out.read_text() == page
  assert 'no work directory' in results.main([f'--runs={tmp_path}/x', *command])
  assert 'nothing to write' in results.main([f'--out={tmp_path}/x.md'])
  capsys.readouterr()


@pytest.mark.parametrize('scale', sorted(imagenette.SCALES))
@pytest.mark.parametrize('table', sorted(imagenette.TABLES))
def test_tables_resolve(table, scale):
  config = imagenette.get_config(f'table={table},scale={scale}').to_dict()
  stages = [checkpoint.resolve_stage(config, s) for s in config['stages']]
  names = set(config['stages'])
  kinds = {}
  for stage in stages:
    for source in (stage['init'], stage['teacher']['weights']):
      assert not source or source.removeprefix('stage:') in names
    match = results.STAGE.fullmatch(stage['stage'])
    if match:
      assert int(match['seed']) == stage['seed']
      kinds.setdefault(match['row'], set()).add((match['kind'], stage['seed']))
  (rows,) = (rows for name, rows in config['report']['tables'] if name == table)
  assert {'none', 'both'} < set(kinds) <= set(rows)
  for found in kinds.values():
    assert found == {(k, s) for k in results.LABELS for s in range(3)}
  # Seed 0 of all rows comes first.
  seeds = [int(s[-1]) for s in config['stages'] if s[-2:-1] == 's']
  assert seeds == sorted(seeds)


def test_none_takes_the_updates_of_both():
  config = imagenette.get_config('table=losses,seeds=1').to_dict()
  steps = {s: config['per_stage'][s]['steps'] for s in config['stages']}
  for kind in results.LABELS:
    both = steps['distill_both_s0'] + steps[f'{kind}_both_s0']
    assert steps[f'{kind}_none_s0'] == both


def test_length_and_rows_and_mistakes():
  config = imagenette.get_config('table=losses,rows=none,seeds=2,length=2')
  assert config.stages == (
    'teacher',
    'finetune_none_s0',
    'few_none_s0',
    'finetune_none_s1',
    'few_none_s1',
  )
  scale = imagenette.SCALES['cpu']
  assert config.per_stage.teacher.steps == scale['teacher_steps']
  steps = 2 * (scale['distill_steps'] + scale['finetune_steps'])
  assert config.per_stage.finetune_none_s0.steps == steps
  assert '2 times' in config.report.scale
  for argument in ('table=loss', 'table=flips,rows=logits'):
    with pytest.raises(ValueError, match=r'losses|flips_never'):
      imagenette.get_config(argument)


def test_a_stage_of_another_kind_is_refused_before_a_table_starts():
  config = imagenette.get_config('table=losses,seeds=2,smoke').to_dict()
  stages = [checkpoint.resolve_stage(config, s) for s in config['stages']]
  stages[-1]['student'] = stages[-1]['student'] | {'head_dim': 7}
  with pytest.raises(ValueError, match='head_dim'):
    train.check_stages(stages[-3:])


@pytest.mark.slow
def test_a_table_of_two_rows_goes_on_after_a_kill(tmp_path):
  """Through main.py: rows that are done stay, the one under way is resumed."""
  argument = 'table=losses,rows=none+both,seeds=1,smoke'
  kept = "('teacher','finetune_none_s0','distill_both_s0','finetune_both_s0')"
  command = [
    *(sys.executable, 'main.py', f'--workdir={tmp_path}'),
    f'--config=configs/imagenette.py:{argument}',
    f'--config.stages={kept}',
    *('--config.student.depth=1', '--config.teacher.depth=1'),
    '--config.distill.num_stages=1',
  ]
  env = dict(os.environ, XLA_FLAGS='')
  # Dies in the middle of the distillation, after the update 2 is saved.
  fatal = (
    'import sys, main; from linearizer_jax import recorder;'
    'add = recorder.Recorder.add\n'
    'def dying(self, step, values):\n'
    '  add(self, step, values)\n'
    "  if self._stage == 'distill_both_s0' and step == 3: sys.exit(9)\n"
    'recorder.Recorder.add = dying\n'
    'from absl import app; app.run(main.main)'
  )
  killed = [sys.executable, '-c', fatal, *command[2:]]
  done = subprocess.run(killed, cwd=ROOT, env=env, check=False)
  assert done.returncode == 9
  before = {p: p.read_bytes() for p in tmp_path.glob('*/result.json')}
  assert {p.parent.name for p in before} == {'teacher', 'finetune_none_s0'}
  done = subprocess.run(
    command, cwd=ROOT, env=env, check=False, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr
  assert {p: p.read_bytes() for p in before} == before
  assert 'distill_both_s0: goes on after step 2' in done.stderr
  assert '| both | ' in done.stdout
  records = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  steps = [
    (r['stage'], r['step'])
    for r in map(json.loads, records)
    if r['split'] == 'train'
  ]
  assert len(steps) == len(set(steps)) == 4 * 3
