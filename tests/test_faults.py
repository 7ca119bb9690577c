"""Damaged checkpoints, full disks, steps that are not finite, what is seen."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import get_config

from linearizer_jax import (
  checkpoint,
  checksums,
  chips,
  metrics,
  recorder,
  report,
  steps,
  train,
)
from linearizer_jax.tasks import classify

OPTIONS = {'keep_last': 2, 'best_metric': 'accuracy', 'best_mode': 'max'}


def state_of(step):
  return {'a': jnp.arange(3000.0) + step, 'b': {'c': jnp.full(3, step)}}


def save_steps(directory, *saved):
  manager = checkpoint.open_manager(directory, OPTIONS)
  for step in saved:
    checkpoint.save(manager, step, state_of(step), {'accuracy': float(step)})
  checkpoint.close(manager)


def newest(directory):
  """(step, state) that a run would go on from."""
  checksums.set_aside_damaged(directory)
  manager = checkpoint.open_manager(directory, OPTIONS)
  step = manager.latest_step()
  at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state_of(0)
  )
  state = checkpoint.restore(manager, step, shapes)
  checkpoint.close(manager)
  return step, state


def assert_is(state, step):
  jax.tree.map(np.testing.assert_array_equal, state, state_of(step))


def zero(path):
  path.write_bytes(bytes(path.stat().st_size))


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def flip(path):
  """One bit of the last byte."""
  data = path.read_bytes()
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp('saved') / 'checkpoints'
  save_steps(directory, 1, 2)
  return directory


def test_whichever_file_is_damaged_the_step_before_is_used(
  saved, tmp_path, caplog
):
  files = [p.relative_to(saved) for p in (saved / '2').rglob('*')]
  files = [name for name in files if (saved / name).is_file()]
  assert len(files) > 10
  for hurt in (zero, truncate, flip, pathlib.Path.unlink):
    for name in files:
      shutil.copytree(saved, tmp_path / 'copy')
      hurt(tmp_path / 'copy' / name)
      caplog.clear()
      checksums.set_aside_damaged(tmp_path / 'copy')
      warned = any('step 2 is damaged' in m for m in caplog.messages)
      kept = sorted(checksums.saved_steps(tmp_path / 'copy'))
      # What Orbax writes last holds nothing that is read back.
      harmless = name.name == checksums.LEFT_OUT or (
        str(name) == '2/commit_success.txt'
      )
      # Without checksums nothing is known, and nothing else is damaged.
      harmless |= hurt is pathlib.Path.unlink and name.name == checksums.FILE
      assert warned != harmless, (hurt, name)
      assert kept == ([1, 2] if harmless else [1])
      shutil.rmtree(tmp_path / 'copy')


def test_a_run_goes_on_before_zeroed_bytes_and_saves_the_step_again(
  saved, tmp_path
):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  largest = max(
    (directory / '2').rglob('*'), key=lambda p: p.is_file() and p.stat().st_size
  )
  zero(largest)
  step, state = newest(directory)
  assert step == 1
  assert_is(state, 1)
  save_steps(directory, 2)
  step, state = newest(directory)
  assert step == 2
  assert_is(state, 2)


def test_what_orbax_writes_last_is_not_needed(saved, tmp_path):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  zero(directory / '2' / checksums.LEFT_OUT)
  (directory / '2' / 'commit_success.txt').write_bytes(b'')
  step, state = newest(directory)
  assert step == 2
  assert_is(state, 2)


def test_a_full_disk_is_named_and_older_steps_stay(saved, tmp_path):
  directory = tmp_path / 'checkpoints'
  shutil.copytree(saved, directory)
  # Files may not grow past 1 kB: the system refuses the bytes that follow.
  code = (
    'import resource, sys, pathlib, test_faults; '
    'resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); '
    'test_faults.save_steps(pathlib.Path(sys.argv[1]), 3)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, directory],
    cwd=pathlib.Path(__file__).parent,
    env=os.environ | {'PYTHONPATH': '..'},  # for configs
    stderr=subprocess.PIPE,
    text=True,
  )
  assert done.returncode == 1
  # Not always the last line: Orbax's threads may still speak as Python ends.
  words = f'OSError: a checkpoint could not be written to {directory}'
  lines = done.stderr.splitlines()
  (error,) = [line for line in lines if line.startswith(words)]
  assert 'Free some space' in error
  step, state = newest(directory)
  assert step == 2
  assert_is(state, 2)
  save_steps(directory, 3)
  assert newest(directory)[0] == 3


class Quadratic:
  """A task whose third batch is not finite."""

  def prepare(self, batch, key):
    return batch

  def loss(self, params, frozen, batch, key):
    loss = jnp.sum(params['w'] ** 2) * batch['factor']
    return loss, {'loss': loss}


def test_an_update_that_is_not_finite_changes_nothing():
  tx = optax.adam(1.0)
  step = jax.jit(
    steps.make_train_step(Quadratic(), tx, ema_decay=0.9, skip_nonfinite=True)
  )
  params = {'w': jnp.ones(3)}
  state = steps.TrainState(jnp.int32(0), params, tx.init(params), params)
  key = jax.random.key(0)
  for factor in (1.0, np.nan, np.inf, 1.0):
    batch = {'factor': jnp.float32(factor)}
    new, values = step(state, {}, batch, key, jnp.float32(0.1))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, new)
    assert all(jax.tree.leaves(same)) == (not np.isfinite(factor))
    state = new
  assert values['updates'] == state.step == 2


def run(config, workdir):
  checkpoint.claim_workdir(workdir, config.to_dict())
  stage = checkpoint.resolve_stage(config.to_dict(), 'stage')
  return train.run_stage(stage, workdir, jax.devices()[:1])


def records(workdir):
  return {r['step']: r for r in metrics.read(workdir) if r['split'] == 'train'}


def poison(monkeypatch, *poisoned):
  """Makes the loss of these updates not a number, by a white batch."""
  fetch = recorder.Recorder.fetch
  prepare = classify.Classify.prepare

  def fetched(self, step, iterator):
    batch = fetch(self, step, iterator)
    if step in poisoned:
      batch['image'] = np.full_like(batch['image'], 255)
    return batch

  def prepared(self, batch, key):
    white = (batch['image'] == 255).all()
    batch = prepare(self, batch, key)
    batch['target'] = jnp.where(white, jnp.nan, batch['target'])
    return batch

  monkeypatch.setattr(recorder.Recorder, 'fetch', fetched)
  monkeypatch.setattr(classify.Classify, 'prepare', prepared)


def test_some_updates_may_be_left_out(tmp_path, monkeypatch, caplog):
  poison(monkeypatch, 3, 5)
  config = get_config()
  config.optimizer.max_nonfinite_steps = 1
  config.optimizer.clip_norm = 0.0
  with pytest.raises(FloatingPointError, match='step 5'):
    run(config, tmp_path / 'run')
  assert 'step 3 is left out, 1 of 1' in caplog.text
  found = records(tmp_path / 'run')
  assert 'loss' not in found[3]
  assert found[4]['skipped_steps'] == 1
  # The field may change where a run goes on, and the count goes on too.
  config.optimizer.max_nonfinite_steps = 2
  run(config, tmp_path / 'run')
  run(config, tmp_path / 'whole')
  again, whole = records(tmp_path / 'run'), records(tmp_path / 'whole')
  assert [again[s].get('loss') for s in range(1, 7)] == [
    whole[s].get('loss') for s in range(1, 7)
  ]
  assert again[6]['skipped_steps'] == 2
  a, b = (checkpoint.load_params(tmp_path / w)[0] for w in ('run', 'whole'))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_a_run_shows(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setitem(chips.DEVICE_KINDS, 'cpu', chips.Chip(1e12))
  monkeypatch.setattr(
    metrics.MetricWriter,
    'image',
    lambda self, step, name, image: drawn.append((step, name, image)),
  )
  config = get_config('distill')
  config.steps = 4
  config.log.images_every_epochs = 0.5  # of four updates
  config.log.profile_steps = (2, 2)
  run(config, tmp_path)
  assert [(step, name) for step, name, _ in drawn] == [(2, 'maps'), (4, 'maps')]
  for _, _, image in drawn:
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image.std() > 10
  assert (drawn[0][2] != drawn[1][2]).any()
  for record in records(tmp_path).values():
    assert 0 <= record['data_wait_share'] < 1
    assert 0 < record['flops_utilization'] < 1
  traces = list((tmp_path / 'tensorboard' / 'stage').rglob('*.xplane.pb'))
  assert len(traces) == 1
  text = report.contents(config.to_dict() | {'stages': ['stage']}, tmp_path)
  for place in ('metrics.jsonl', 'stage/checkpoints', 'tensorboard --logdir'):
    assert place in text
  assert 'maps.png' not in text  # was not drawn


def test_utilisation_is_left_out_for_unknown_devices():
  class Device:
    def __init__(self, kind):
      self.device_kind = kind

  peaks = {
    kind: chips.peak_flops(Device(kind))
    for kind in ('cpu', 'TPU v5', 'TPU v5 lite', 'NVIDIA H200', 'NVIDIA L40S')
  }
  assert peaks == {
    'cpu': None,
    'TPU v5': 459e12,
    'TPU v5 lite': 197e12,
    'NVIDIA H200': 989e12,
    'NVIDIA L40S': None,
  }


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing():
  command = [sys.executable, pathlib.Path(__file__).with_name('kills.py')]
  done = subprocess.run(
    [*command, '--kills=3', '--steps=30'],
    env=os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert '"kills": 3' in done.stdout
