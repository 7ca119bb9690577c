"""Tables whose rows are runs: their stages, resuming, and the page."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import imagenette, tables
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


def finish(workdir, stage, value, steps, metric='accuracy'):
  directory = checkpoint.stage_dir(workdir, stage)
  directory.mkdir()
  checkpoint.write_json(
    directory / 'result.json',
    {metric: value, 'loss': 1.0, 'seconds': 10.0, 'steps': steps},
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
  # Where there are other rows, the baselines alone make no table.
  other = tmp_path / 'other'
  checkpoint.claim_workdir(other, losses)
  checkpoint.claim_workdir(other, flips)
  finish(other, 'finetune_none_s0', 60.0, 3)
  finish(other, 'few_flips_never_s0', 40.0, 1)
  tables = {x['table'] for x in results.collect(other) if 'row' in x}
  assert tables == {'flips'}
  # The page alone, from the lines that are kept.
  out.unlink()
  assert not results.main([f'--out={out}'])
  assert out.read_text() == page
  assert 'no work directory' in results.main([f'--runs={tmp_path}/x', *command])
  assert 'nothing to write' in results.main([f'--out={tmp_path}/x.md'])
  capsys.readouterr()


def test_segmentations_are_a_table_of_mious(tmp_path):
  """Rows of the same names as elsewhere, with what came before them."""
  for table in tables.SEGMENTATIONS:
    argument = f'table={table},segment_data=CAMVID,seeds=1'
    config = imagenette.get_config(argument).to_dict()
    checkpoint.claim_workdir(tmp_path, config)
  finish(tmp_path, 'teacher', 80.0, 5)
  finish(tmp_path, 'distill_both_s0', 1.0, 4)
  finish(tmp_path, 'finetune_both_s0', 63.0, 3)
  finish(tmp_path, 'segment_random_s0', 20.5, 2, 'mIoU')
  finish(tmp_path, 'segment_both_s0', 22.0, 2, 'mIoU')
  finish(tmp_path, 'upernet_random_s0', 30.0, 2, 'mIoU')
  lines = results.collect(tmp_path)
  found = [x for x in lines if 'row' in x]
  assert [
    (x['row'], x['mIoU'], x['updates'], x['seconds'])
    for x in found
    if x['table'] == 'segmentation'
  ] == [('random', 20.5, 2, 10.0), ('both', 22.0, 9, 30.0)]
  # Their classifications stand in a table of classifications.
  assert {(x['table'], x['row']) for x in found if 'accuracy' in x} == {
    ('losses', 'teacher'),
    ('losses', 'both'),
  }
  page = results.page(lines)
  assert page.count('CamVid') == 2
  assert '| random | 30.0 |' in page[page.index('## segmentation_upernet') :]
  table = page[page.index('## segmentation') :].split('\n## ')[0].splitlines()
  assert [x for x in table if x.startswith('| ')] == [
    '| row | mIoU | against random | against none | seeds | updates | seconds '
    '|',
    '| --- | --- | --- | --- | --- | --- | --- |',
    '| random | 20.5 |  |  | 1 | 2 | 10 |',
    '| both | 22.0 | +1.5 |  | 1 | 9 | 30 |',
  ]
  assert results.merge(lines, lines) == lines


@pytest.mark.parametrize(('table', 'kind'), list(tables.SEGMENTATIONS.items()))
def test_segmentations_differ_in_their_start_alone(table, kind):
  argument = f'table={table},segment_data=CAMVID,seeds=1'
  config = imagenette.get_config(argument).to_dict()
  stages = [
    checkpoint.resolve_stage(config, stage)
    for stage in config['stages']
    if stage.startswith(kind)
  ]
  starts = {stage.pop('stage'): stage.pop('init') for stage in stages}
  assert starts == {
    f'{kind}_random_s0': '',
    f'{kind}_none_s0': 'stage:finetune_none_s0',
    f'{kind}_both_s0': 'stage:finetune_both_s0',
    f'{kind}_features_class_s0': 'stage:finetune_features_class_s0',
  }
  assert all(stage == stages[0] for stage in stages)
  head = {'segment': 'linear', 'upernet': 'upernet'}[kind]
  assert stages[0]['segment']['head'] == head
  data = stages[0]['data']
  assert (data['data_dir'], data['eval_split']) == ('CAMVID', 'test')
  assert (data['num_classes'], data['dense']) == (11, True)
  with pytest.raises(ValueError, match='segment_data=FOLDER'):
    imagenette.get_config(f'table={table}')
  # The other stages are those of the other tables.
  other = imagenette.get_config('table=recipes,seeds=1').to_dict()
  shared = set(config['stages']) & set(other['stages'])
  assert len(shared) == 6
  for stage in shared:
    assert config['per_stage'][stage] == other['per_stage'][stage]


def test_images_of_twice_the_side_start_from_the_same_teacher():
  config = imagenette.get_config('table=resolution,seeds=1').to_dict()
  stages = {s: checkpoint.resolve_stage(config, s) for s in config['stages']}
  for name, stage in stages.items():
    side = 2 if 'double' in name else 1
    assert stage['data']['image_size'] == side * 32
    assert stage['data']['cache_pixels'] == side * 48
  distil = stages['distill_both_double_s0']
  assert distil['distill']['form'] == 'linear'
  assert distil['teacher']['weights'] == 'stage:teacher'
  assert stages['teacher_double']['init'] == 'stage:teacher'


@pytest.mark.parametrize('table', [*tables.SEGMENTATIONS, 'resolution'])
def test_smoke_of_a_table_with_other_data_checks(table):
  config = imagenette.get_config(f'table={table},seeds=1,smoke').to_dict()
  stages = [checkpoint.resolve_stage(config, s) for s in config['stages']]
  train.check_stages(stages[-2:])


@pytest.mark.parametrize('scale', sorted(tables.SCALES))
@pytest.mark.parametrize('table', sorted(tables.TABLES))
def test_tables_resolve(table, scale):
  argument = f'table={table},scale={scale},segment_data=CAMVID'
  config = imagenette.get_config(argument).to_dict()
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
  for row, found in kinds.items():
    wanted = {'finetune', 'few'}
    if table in tables.NO_FEW_LABELS:
      wanted = {'finetune'}
    if table in tables.SEGMENTATIONS:
      wanted = {tables.SEGMENTATIONS[table]}
      wanted |= set() if row == 'random' else {'finetune'}
    assert found == {(k, s) for k in wanted for s in range(3)}
  # Seed 0 of all rows comes first.
  seeds = [int(s[-1]) for s in config['stages'] if s[-2:-1] == 's']
  assert seeds == sorted(seeds)


def test_none_takes_the_updates_of_both():
  config = imagenette.get_config('table=losses,seeds=1').to_dict()
  steps = {s: config['per_stage'][s]['steps'] for s in config['stages']}
  for kind in ('finetune', 'few'):
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
  scale = tables.SCALES['cpu']
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
