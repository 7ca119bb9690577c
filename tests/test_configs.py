"""Every config resolves at full size: shapes, shardings and optimizer."""

import importlib
import pathlib
import subprocess
import sys

import jax
import ml_collections
import pytest

from configs import common
from linearizer_jax import (
  checkpoint,
  models,
  optimizer,
  sharding,
  tasks,
  train,
)
from linearizer_jax.data import pipeline

FOLDER = pathlib.Path(__file__).parent.parent / 'configs'
NAMES = sorted(
  path.stem
  for path in FOLDER.glob('*.py')
  if path.stem not in ('__init__', 'common', 'tables')
)


def get_config(name, argument=None):
  return importlib.import_module(f'configs.{name}').get_config(argument)


def stages(config):
  config = config.to_dict()
  for stage in config['stages']:
    yield ml_collections.ConfigDict(checkpoint.resolve_stage(config, stage))


@pytest.mark.parametrize('name', NAMES)
def test_full_size_resolves(name):
  mesh = sharding.make_mesh(fsdp=2)
  assert mesh.size == 8
  for config in stages(get_config(name)):
    task = tasks.make_task(config, mesh, 1000)
    tx = optimizer.make_optimizer(config)
    programs = train.make_programs(config, task, tx, mesh)
    leaves = jax.tree.leaves(programs.state)
    assert all(leaf.sharding.mesh == mesh for leaf in leaves)
    large = [x for x in leaves if x.size >= sharding.MIN_FSDP_SIZE]
    assert all('fsdp' in str(x.sharding.spec) for x in large)


@pytest.mark.parametrize('name', NAMES)
def test_smoke_is_small_and_checks(name):
  for config in stages(get_config(name, 'smoke')):
    assert config.data.name == 'generated'
    assert config.steps <= 5
    train.check_stage(config.to_dict())


@pytest.mark.parametrize('name', NAMES)
def test_docstring_has_the_command(name):
  text = (FOLDER / f'{name}.py').read_text()
  assert 'python main.py' in text.split('"""')[1]


def test_data_fields_are_those_of_the_pipeline():
  import dataclasses

  fields = {field.name for field in dataclasses.fields(pipeline.DataConfig)}
  assert set(get_config('distill_base').data.keys()) == fields


def test_the_last_stage_is_the_one_to_export():
  for argument in (None, 'losses'):
    stages = get_config('digits', argument).stages
    assert (stages[0], *stages[-2:]) == ('teacher', 'distill', 'finetune')
    assert set(stages) == set(get_config('digits', argument).per_stage)


def test_paper_defaults():
  config = get_config('distill_base')
  assert config.distill.mask_ratio == 0.75
  assert config.distill.num_stages == 4
  assert config.distill.mask_weight == 1.0
  assert config.distill.match_tokens == 'visible'


@pytest.mark.parametrize(
  ('argument', 'network', 'size', 'epochs', 'drop_path'),
  [
    (None, 'adventurer_base_patch16', 224, 100, 0.1),
    ('size=small,resolution=448', 'adventurer_small_patch16', 448, 100, 0.1),
    ('size=large', 'adventurer_large_patch16', 224, 50, 0.2),
    ('teacher=clip_base_patch16', 'clip_base_patch16', 224, 100, 0.1),
    ('teacher=clip_large_patch14', 'clip_large_patch14', 224, 50, 0.2),
  ],
)
def test_recipe_of_fine_tuning(argument, network, size, epochs, drop_path):
  config = get_config('finetune_imagenet', argument)
  section = config[config.train_role]
  assert (section.name, section.drop_path) == (network, drop_path)
  assert config.init == (network if config.train_role == 'teacher' else '')
  assert config.data.image_size == size
  assert (config.epochs, config.batch_size) == (epochs, 1024)
  assert config.schedule.warmup_epochs == 5
  assert config.optimizer.learning_rate == 5e-4
  assert config.optimizer.weight_decay == 0.05
  assert config.optimizer.layer_decay == 0.75
  assert config.optimizer.ema_decay == 0.9999
  assert config.classify.label_smoothing == 0.1
  assert (config.classify.mixup, config.classify.cutmix) == (0.8, 1.0)
  data = config.data
  assert (data.randaugment_ops, data.randaugment_magnitude) == (2, 9)
  assert data.randaugment_std == 0.5
  model, _ = models.from_config(config, config.train_role)
  assert model.drop_path == drop_path


def test_unknown_argument_is_refused():
  with pytest.raises(ValueError, match='epoch'):
    get_config('distill_base', 'epoch=3')


def test_value_of_an_argument_is_refused_by_name():
  with pytest.raises(ValueError, match=r'epochs=ten .*expected epochs=float'):
    common.parse('epochs=ten', epochs=60.0)


def test_losses_are_chosen_by_name():
  (config,) = stages(get_config('distill_base', 'losses=features'))
  task = tasks.make_task(config, sharding.make_mesh(), 1000)
  shapes = jax.eval_shape(
    lambda key: task.init(key, tasks.image_shape(config)), jax.random.key(0)
  )
  # Every token in the teacher's width, its class token where CLIP projects to.
  widths = {k: x['kernel'].shape[1] for k, x in shapes['heads'].items()}
  assert sorted(widths.values()) == [512, 768]
  with pytest.raises(ValueError, match=r'losses=papers .* paper, features'):
    get_config('distill_large', 'losses=papers')


def test_a_short_run_has_a_short_warm_up():
  for argument, epochs in (('epochs=2', 0.5), ('', 5.0)):
    config = importlib.import_module('configs.imagenette').get_config(argument)
    assert config.schedule.warmup_epochs == epochs


def test_unknown_field_is_refused_by_name():
  with pytest.raises(AttributeError, match='mask_ratio'):
    get_config('distill_base').distill.mask_ration = 0.5
  config = get_config('digits').to_dict()
  config['per_stage']['distill']['distil'] = {}
  with pytest.raises(ValueError, match=r'per_stage\.distill\.distil '):
    checkpoint.resolve_stage(config, 'distill')


def test_images_are_normalised_as_the_weights_or_the_config_say():
  config = get_config('distill_base')
  for role, mean in (('teacher', 0.48145466), ('student', 0.485)):
    _, stats = models.from_config(config, role)
    assert stats[0][0] == mean
  config.student.mean = (0.3, 0.3, 0.3)
  _, (mean, std) = models.from_config(config, 'student')
  assert mean == (0.3, 0.3, 0.3)
  assert std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('teacher.mean', (0.5,)),
    ('student.dtype', 'float17'),
    ('log.profile_steps', (5,)),
  ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(field, value):
  config = get_config('distill_base', 'smoke')
  config.update_from_flattened_dict({field: value})
  stage = checkpoint.resolve_stage(config.to_dict(), 'distill')
  with pytest.raises(ValueError, match=rf'config\.{field}'):
    train.check_stages([stage])


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.student.widht=64', 'Did you mean --config.student.width?'),
    ('--config.mask_ratio=0.5', ' or --config.distill.mask_ratio?'),
    ('--config.epochs.x=1', 'Did you mean --config.epochs?'),
    ('--config=configs/digit.py', 'there is no such file'),
    ('--config=configs/digits.py:loses', "unknown argument 'loses'"),
  ],
)
def test_a_mistyped_field_or_file_is_said_in_one_line(flag, said):
  done = run('main.py', flag)
  assert done.returncode == 1
  assert done.stderr.startswith(flag)
  assert said in done.stderr
  assert done.stderr.count('\n') == 1


def test_a_value_that_is_no_number_is_said_in_one_line():
  """Beside another field, of which absl would complain."""
  done = run('main.py', '--config.data.data_dir=x', '--config.batch_size=ten')
  assert done.returncode == 1
  assert done.stderr.startswith('main.py: flag --config.batch_size=ten: ')
  assert done.stderr.count('\n') == 1


def run(*words):
  """Python on these words, in the folder of main.py."""
  return subprocess.run(
    [sys.executable, *words], cwd=FOLDER.parent, text=True, capture_output=True
  )


def test_a_stage_that_cannot_start_is_said_in_one_line(tmp_path):
  done = run('main.py', f'--workdir={tmp_path}', '--config.data.name=digit')
  assert done.returncode == 1
  assert done.stderr.startswith("main.py: data.name is 'digit', expected one")
  assert done.stderr.count('\n') == 1


def test_faults_keep_their_traceback():
  """A `raise` of ours is meant for the user; what else is raised is not."""
  code = """
import main
from configs import common

def told(function, argument):
  try:
    function(argument)
  except Exception as error:
    return main.is_told(error)

print(told(common.losses, 'x'), told(int, 'x'), told(common.smoke, 'x'))
"""
  assert run('-c', code).stdout == 'True False False\n'


def test_what_a_worker_process_tells_is_told(tmp_path):
  for split in ('train', 'val'):
    (tmp_path / split / 'all').mkdir(parents=True)
    (tmp_path / split / 'all' / 'broken.png').write_bytes(b'')
  code = """
import contextlib, sys
import main
from linearizer_jax.data import pipeline

data = dict(name='folder', data_dir=sys.argv[1], image_size=8, num_workers=1)
batches = pipeline.make_train_iterator(data, batch_size=1, seed=0)
with contextlib.closing(batches):
  try:
    next(batches)
  except ValueError as error:
    print(main.is_told(error), error)
"""
  said = run('-c', code, str(tmp_path)).stdout
  assert said.startswith(f'True Cannot decode the image {tmp_path}/train/all/')
  assert 'data.max_broken' in said
