"""One run on many hosts: two processes of four virtual devices each."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import distill_large
from linearizer_jax import (
  checkpoint,
  hosts,
  metrics,
  optimizer,
  sharding,
  tasks,
  train,
)
from linearizer_jax.data import pipeline

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An image folder of two classes."""
  root = tmp_path_factory.mktemp('images')
  rng = np.random.default_rng(0)
  for split, count in (('train', 12), ('val', 5)):
    for label in range(2):
      (root / split / str(label)).mkdir(parents=True)
      for i in range(count):
        image = rng.integers(0, 128, (40, 40, 3)) + 127 * label
        path = root / split / str(label) / f'{i}.png'
        Image.fromarray(image.astype(np.uint8)).save(path)
  return root


def start(workdir, processes, *fields):
  """main.py on eight virtual devices, as one process or as several."""
  env = dict(
    os.environ,
    XLA_FLAGS='--xla_backend_optimization_level=0 '
    f'--xla_force_host_platform_device_count={8 // processes}',
  )
  flags = [f'--config.{field}' for field in fields]
  command = [sys.executable, 'main.py', '--config=tests/tiny.py', *flags]
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  group = []
  for index in range(processes):
    several = [
      f'--coordinator=localhost:{port}',
      f'--num_processes={processes}',
      f'--process_id={index}',
    ]
    output = (workdir.parent / f'{workdir.name}.{index}').open('w+')
    group.append(
      subprocess.Popen(
        [*command, f'--workdir={workdir}', *several * (processes > 1)],
        cwd=ROOT,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT,
      )
    )
  return group


def outputs(workdir, processes=2):
  return [
    (workdir.parent / f'{workdir.name}.{i}').read_text()
    for i in range(processes)
  ]


def finish(group, workdir, code=0):
  for process in group:
    process.wait(timeout=600)
  text = '\n'.join(outputs(workdir, len(group)))
  assert [process.returncode for process in group] == [code] * len(group), text


def losses(workdir, split='train'):
  return {
    record['step']: record['loss']
    for record in metrics.read(workdir)
    if record['split'] == split
  }


def reach(workdir, step, group):
  """Waits until the run has recorded an update."""
  while max(losses(workdir), default=0) < step:
    assert all(process.poll() is None for process in group), outputs(workdir)
    time.sleep(0.05)


def assert_close(one, two):
  for split in ('train', 'eval'):
    a, b = losses(one, split), losses(two, split)
    assert a.keys() == b.keys()
    # A cross-entropy near 0 is the difference of numbers near 1.
    np.testing.assert_allclose(
      list(a.values()), list(b.values()), rtol=1e-5, atol=1e-7
    )


# Sharded parameters, two micro-steps, recomputed blocks: all of it at once.
def common_fields(folder):
  return (
    'data.name=folder',
    f'data.data_dir={folder}',
    f'steps={STEPS}',
    'batch_size=16',
    'checkpoint.every_steps=5',
    'checkpoint.keep_last=100',
    'parallel.fsdp=4',
    'parallel.accumulate_steps=2',
    'student.width=256',  # large enough to be cut over devices
  )


@pytest.fixture(scope='module')
def one(folder, tmp_path_factory):
  """The run of one process with eight devices."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  finish(start(workdir, 1, *common_fields(folder)), workdir)
  return workdir


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_bit_for_bit(
  folder, one, tmp_path
):
  fields = common_fields(folder)
  finish(start(tmp_path / 'two', 2, *fields), tmp_path / 'two')
  assert_close(one, tmp_path / 'two')
  first, second = outputs(tmp_path / 'two')
  assert 'tensorboard --logdir' in first
  assert 'INFO' not in second
  assert 'train.py' not in second
  assert 'loss' not in second

  group = start(tmp_path / 'killed', 2, *fields)
  reach(tmp_path / 'killed', 12, group)
  for process in group:
    process.kill()
  for process in group:
    process.wait()
  assert not (tmp_path / 'killed' / 'stage' / 'result.json').exists()
  finish(start(tmp_path / 'killed', 2, *fields), tmp_path / 'killed')
  assert 'goes on after step' in outputs(tmp_path / 'killed')[0]
  assert losses(tmp_path / 'killed') == losses(tmp_path / 'two')
  a, b = (checkpoint.load_params(tmp_path / w)[0] for w in ('killed', 'two'))
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_the_run_of_one_process_goes_on_as_two(folder, one, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(one, workdir)
  (workdir / 'stage' / 'result.json').unlink()
  for path in (workdir / 'stage' / 'checkpoints').iterdir():
    if path.name.isdigit() and int(path.name) > STEPS // 2:
      shutil.rmtree(path)
  finish(start(workdir, 2, *common_fields(folder)), workdir)
  assert 'goes on after step 10' in outputs(workdir)[0]  # the last one saved
  assert_close(one, workdir)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_ends_all(one, tmp_path):
  workdir = tmp_path / 'run'
  group = start(
    workdir,
    2,
    'steps=100000',
    'checkpoint.every_steps=0',
    'student.width=256',
    f'init={one}',  # each process reads it on its own
  )
  reach(workdir, 3, group)
  began = time.monotonic()
  group[1].send_signal(signal.SIGTERM)
  finish(group, workdir, 128 + signal.SIGTERM)
  took = time.monotonic() - began
  print(f'SIGTERM to exit took {took:.1f} s')
  (step,) = [
    int(path.name)
    for path in (workdir / 'stage' / 'checkpoints').iterdir()
    if path.name.isdigit()
  ]
  assert step == max(losses(workdir))
  assert f'step {step} is saved' in outputs(workdir)[0]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(folder, tmp_path):
  """Of a broken image only the process whose share it is hears."""
  images = tmp_path / 'images'
  shutil.copytree(folder, images)
  (images / 'train' / '0' / '3.png').write_bytes(b'not an image')
  workdir = tmp_path / 'run'
  began = time.monotonic()
  fields = 'data.name=folder', f'data.data_dir={images}', 'steps=100000'
  group = start(workdir, 2, *fields)
  for process in group:
    assert process.wait(timeout=240) != 0, outputs(workdir)
  print(f'start to the end of both took {time.monotonic() - began:.1f} s')
  assert any('3.png' in text for text in outputs(workdir))


@pytest.mark.parametrize('name', ['generated', 'folder'])
@pytest.mark.parametrize('threads', [1, 3])
def test_shares_are_disjoint_and_make_the_batch(name, threads, folder):
  data = {
    'name': name,
    'data_dir': str(folder),
    'num_examples': 24,
    'image_size': 32,
    'crop_scale': (0.3, 1.0),
    'num_threads': threads,
  }

  def batches(count, **share):
    iterator = pipeline.make_train_iterator(
      data, batch_size=8, seed=3, process_count=count, **share
    )
    iterator.set_state({'step': 2})
    found = [next(iterator) for _ in range(4)]
    iterator.close()
    return found

  whole = batches(1)
  parts = [batches(4, process_index=i) for i in range(4)]
  for step, batch in enumerate(whole):
    for key, value in batch.items():
      together = np.concatenate([part[step][key] for part in parts])
      np.testing.assert_array_equal(together, value)
  # Three steps of eight are one epoch of 24: every example once.
  plain = data | {'crop_scale': None}
  order = pipeline.make_train_iterator(plain, batch_size=8, seed=3)
  seen = [image.tobytes() for _ in range(3) for image in next(order)['image']]
  order.close()
  assert len(set(seen)) == 24


def test_an_eighth_of_the_large_student_on_each_device():
  config = distill_large.get_config()
  config = checkpoint.resolve_stage(config.to_dict(), 'distill')
  config = ml_collections.ConfigDict(config)
  mesh = sharding.make_mesh(jax.devices()[:8], config.parallel.fsdp)
  task = tasks.make_task(config, mesh, 1000)
  tx = optimizer.make_optimizer(config)
  state = train.make_programs(config, task, tx, mesh).state

  def held(tree):
    return sum(
      np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )

  for tree in (state.params, state.opt_state):
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert whole > 1e9
    assert held(tree) == pytest.approx(whole / 8, rel=0.1)


def test_flags_that_belong_together_are_asked_for():
  with pytest.raises(ValueError, match='give all three'):
    hosts.join('localhost:1')
  with pytest.raises(ValueError, match='between 0 and 1'):
    hosts.join('localhost:1', 2, 2)
