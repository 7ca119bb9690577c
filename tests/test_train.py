"""The loop and the real entry point: stages, resuming, faults."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny import get_config

from configs import common, digits
from linearizer_jax import checkpoint, metrics, recorder, report, train
from linearizer_jax.tasks import classify

ROOT = pathlib.Path(__file__).parent.parent


def tiny(task='classify', /, **changes):
  """tests/tiny.py with some fields changed, as a dict."""
  config = get_config(task)
  config.update_from_flattened_dict(changes)
  return config.to_dict()


def run(config, workdir, devices=None):
  checkpoint.claim_workdir(workdir, config)
  stage = checkpoint.resolve_stage(config, config['stages'][0])
  return train.run_stage(stage, workdir, devices or jax.devices()[:1])


def losses(workdir):
  return {
    record['step']: record['loss']
    for record in metrics.read(workdir)
    if record['split'] == 'train'
  }


def assert_same_run(one, two):
  """Losses and final parameters agree to the bit."""
  assert losses(one) == losses(two)
  a, b = (checkpoint.load_params(w)[0] for w in (one, two))
  jax.tree.map(np.testing.assert_array_equal, a, b)


class KilledError(Exception):
  pass


def kill_at(monkeypatch, step):
  """Makes the loop die, without warning, after the update `step`."""
  add = recorder.Recorder.add

  def dying(self, at, values):
    add(self, at, values)
    if at == step:
      raise KilledError

  monkeypatch.setattr(recorder.Recorder, 'add', dying)


@pytest.mark.parametrize('num_devices', [1, 8])
@pytest.mark.parametrize('task', ['classify', 'distill'])
def test_a_killed_run_goes_on_bit_for_bit(
  task, num_devices, tmp_path, monkeypatch
):
  config = tiny(task)
  devices = jax.devices()[:num_devices]
  whole = run(config, tmp_path / 'whole', devices)
  assert whole['steps'] == 6
  with monkeypatch.context() as patch:
    kill_at(patch, 5)
    with pytest.raises(KilledError):
      run(config, tmp_path / 'killed', devices)
  again = run(config, tmp_path / 'killed', devices)
  assert sorted(losses(tmp_path / 'killed')) == [1, 2, 3, 4, 5, 6]
  assert_same_run(tmp_path / 'whole', tmp_path / 'killed')
  assert again['loss'] == whole['loss']
  # A third call finds the stage done.
  assert run(config, tmp_path / 'killed', devices) == again


def test_eight_devices_give_the_losses_of_one(tmp_path):
  config = tiny('distill')
  run(config, tmp_path / 'one')
  run(
    config | {'parallel': config['parallel'] | {'fsdp': 2}},
    tmp_path / 'eight',
    jax.devices(),
  )
  one, eight = losses(tmp_path / 'one'), losses(tmp_path / 'eight')
  np.testing.assert_allclose(
    list(one.values()), list(eight.values()), rtol=1e-5
  )


def test_accumulated_gradients_are_those_of_the_batch(tmp_path):
  run(tiny('distill'), tmp_path / 'one')
  run(tiny('distill', **{'parallel.accumulate_steps': 4}), tmp_path / 'parts')
  one, parts = losses(tmp_path / 'one'), losses(tmp_path / 'parts')
  np.testing.assert_allclose(
    list(one.values()), list(parts.values()), rtol=1e-5
  )


def test_averages_and_best_steps_are_kept(tmp_path):
  config = tiny(
    **{
      'optimizer.ema_decay': 0.9,
      'checkpoint.best_metric': 'loss',
      'checkpoint.best_mode': 'min',
      'checkpoint.keep_last': 1,
      'log.eval_every_epochs': 0.25,
    }
  )
  result = run(config, tmp_path)
  assert result['ema_loss'] != result['loss']
  evaluated = {
    r['step']: r['loss'] for r in metrics.read(tmp_path) if r['split'] == 'eval'
  }
  assert len(evaluated) == 6
  best = min(evaluated, key=evaluated.get)
  params, info = checkpoint.load_params(tmp_path)
  assert info['step'] == best
  saved = os.listdir(tmp_path / 'stage' / 'checkpoints')
  assert set(saved) == {str(best), '6'}
  raw, _ = checkpoint.load_params(tmp_path, ema=False)
  assert any(
    (a != b).any()
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(raw), strict=True)
  )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
  config = tiny()
  prepare = classify.Classify.prepare

  def poisoned(self, batch, key):
    batch = prepare(self, batch, key)
    # From the fourth update on: the key is that of a step.
    bad = jax.random.bits(key) == jax.random.bits(poison)
    batch['target'] = jax.numpy.where(bad, np.nan, batch['target'])
    return batch

  train_key = jax.random.split(jax.random.key(config['seed']), 4)[1]
  poison = jax.random.fold_in(train_key, 3)
  monkeypatch.setattr(classify.Classify, 'prepare', poisoned)
  with pytest.raises(FloatingPointError, match='step 4'):
    run(config, tmp_path)
  assert os.listdir(tmp_path / 'stage' / 'checkpoints') == ['2']
  assert not (tmp_path / 'stage' / 'result.json').exists()


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'batch_size': 12}, 'multiple of 8 = 8 devices'),
    ({'parallel.fsdp': 3}, 'parallel.fsdp'),
    ({'distill.mask_ratio': 1.0}, 'distill.mask_ratio'),
    ({'distill.mask_ratio': 0.01}, 'distill.mask_ratio'),
    ({'distill.mask_ratio': 0.0}, 'mask_weight'),
    ({'distill.num_stages': 3}, 'between 1 and 2'),
    ({'distill.match_tokens': 'some'}, 'match_tokens'),
    ({'data.image_size': 30}, 'multiples of 8'),
    ({'task': 'paint'}, 'config.task'),
    ({'student.name': 'resnet'}, 'no model'),
    ({'student.head_dim': 8}, 'no field head_dim'),
    ({'schedule.warmup_epochs': 99.0}, 'schedule.warmup_epochs'),
    ({'distill.mask_loss': 'l1'}, 'distill.mask_loss'),
    ({'parallel.accumulate_steps': 0}, 'at least 1'),
    ({'train_role': 'pupil'}, 'train_role'),
    ({'seed': -1}, 'config.seed'),
    ({'steps': 0, 'epochs': 0.0}, 'nothing to train'),
    ({'steps': -1}, 'nothing to train'),
  ],
)
def test_bad_configs_are_refused_before_anything_starts(changes, words):
  config = tiny('distill', **changes)
  with pytest.raises(ValueError, match=words):
    train.check_stage(checkpoint.resolve_stage(config, 'stage'))


def test_weights_that_are_not_there_are_named(tmp_path):
  for name, source, words in (
    ('clip_base_patch16', 'gone.safetensors', 'gone.safetensors'),
    ('vit_tiny_patch16', 'gone', 'work directory'),
  ):
    config = tiny(
      'distill',
      **{
        'teacher.name': name,
        'teacher.weights': str(tmp_path / source),
      },
    )
    with pytest.raises((ValueError, FileNotFoundError), match=words):
      run(config, tmp_path / name)


def test_weights_of_another_size_are_refused_with_the_flag(tmp_path):
  run(tiny(**{'student.width': 8}), tmp_path / 'narrow')
  config = tiny('classify', init=str(tmp_path / 'narrow'))
  with pytest.raises(ValueError, match=r'--config\.student\.width=8'):
    run(config, tmp_path / 'run')


def test_another_config_is_refused_by_name(tmp_path):
  checkpoint.claim_workdir(tmp_path, tiny())
  checkpoint.claim_workdir(tmp_path, tiny(**{'log.every_steps': 7}))
  with pytest.raises(ValueError, match=r'optimizer\.learning_rate was 0\.0015'):
    checkpoint.claim_workdir(tmp_path, tiny(**{'optimizer.learning_rate': 0.1}))
  with pytest.raises(ValueError, match='or remove it: nothing is saved there'):
    checkpoint.claim_workdir(tmp_path, tiny('distill'))
  (tmp_path / 'stage').mkdir()
  (tmp_path / 'stage/result.json').write_text('{}')  # of an evaluation alone
  with pytest.raises(ValueError, match=r'or set these fields back\.$'):
    checkpoint.claim_workdir(tmp_path, tiny('distill'))


def test_the_last_stage_is_that_of_the_role(tmp_path):
  config = tiny(train_role='student') | {'stages': ('first', 'last')}
  config['per_stage'] = {'first': {'train_role': 'teacher'}}
  checkpoint.claim_workdir(tmp_path, config)
  for stage in config['stages']:
    (tmp_path / stage / 'checkpoints' / '1').mkdir(parents=True)
    (tmp_path / stage / 'result.json').write_text('{}')
  for role, stage in (
    (None, 'last'),
    ('student', 'last'),
    ('teacher', 'first'),
  ):
    assert checkpoint.describe(tmp_path, role=role)['stage'] == stage


def test_a_report_leaves_out_stages_that_did_not_run():
  config = digits.get_config().to_dict() | {'stages': ('teacher', 'distill')}
  options = report.reported(config)
  assert options['rows'] == {'teacher': ('teacher',)}
  assert [name for name, _ in options['maps']] == ['teacher', 'distilled']
  assert options['nearest_neighbour'] == ''
  assert report.reported(digits.get_config().to_dict())['nearest_neighbour']


def test_a_report_of_features_alone_lists_what_is_there(tmp_path, capsys):
  config = common.base().to_dict() | {'stages': ('evaluate',)}
  (tmp_path / 'evaluate' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'metrics.jsonl').touch()
  result = {'knn_class': 35.0, 'seconds': 0}
  checkpoint.write_json(tmp_path / 'evaluate' / 'result.json', result)
  report.write(config, tmp_path)
  printed = capsys.readouterr().out
  assert printed.startswith('work directory')  # no table, which has no rows
  assert 'checkpoints' not in printed


def start(workdir, *flags):
  """main.py as a user starts it, on one device."""
  env = dict(os.environ, XLA_FLAGS='')
  command = [sys.executable, 'main.py', f'--workdir={workdir}', *flags]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )


def test_main_runs_every_stage_and_reports(tmp_path):
  process = start(tmp_path, '--config=configs/digits.py:smoke')
  output, _ = process.communicate(timeout=400)
  assert process.returncode == 0, output
  summary = json.loads((tmp_path / 'summary.json').read_text())
  rows = {'teacher', 'nearest_neighbour', 'supervised', 'distilled'}
  assert set(summary) == rows | {'seconds'}
  assert all(0 <= summary[row] <= 100 for row in rows)
  for picture in ('losses.png', 'maps.png'):
    assert (tmp_path / picture).read_bytes().startswith(b'\x89PNG')
  assert 'nearest neighbour' in output


def test_sigterm_saves_and_exits(tmp_path):
  flags = [
    '--config=configs/digits.py:smoke',
    "--config.stages=('teacher',)",
    '--config.report.rows=()',
    '--config.steps=100000',
    '--config.checkpoint.every_steps=0',
  ]
  process = start(tmp_path, *flags)
  for _ in range(600):
    if losses(tmp_path) or process.poll() is not None:
      break
    time.sleep(0.5)
  assert process.poll() is None, process.stdout.read()
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM, output
  (saved,) = os.listdir(tmp_path / 'teacher' / 'checkpoints')
  assert int(saved) == max(losses(tmp_path))
  assert 'is saved' in output


def test_main_refuses_a_mistyped_field(tmp_path):
  process = start(tmp_path, '--config.distill.mask_ration=0.5')
  output, _ = process.communicate(timeout=100)
  assert process.returncode
  assert 'mask_ratio' in output
  assert not any(tmp_path.iterdir())
