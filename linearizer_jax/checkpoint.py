"""Work directories: Orbax checkpoints, the resolved config, finished stages.

    workdir/config.json              the resolved config
    workdir/<stage>/checkpoints/     steps: the best and the last n
    workdir/<stage>/result.json      there once the stage is finished

A checkpoint holds the train state (parameters, optimizer, step, average),
never the teacher. Its step is the position in the data, for any number of
processes. All processes save their part; one alone can read (`load_params`).
"""

import contextlib
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from linearizer_jax import checksums, hosts

STATE = 'state'
SAVED = '*/checkpoints'  # of all stages, in a work directory
# What may differ when a run goes on: it changes no number.
FREE_TO_CHANGE = (
  'log.',
  'checkpoint.',
  'data.num_workers',
  'data.num_threads',
  'data.max_broken',
  'data.timeout_seconds',
  'data.data_dir',
  'parallel.fsdp',
  'report.',
  'optimizer.max_nonfinite_steps',
)


class _Manager(ocp.CheckpointManager):
  """Its questions to the preemption service would upset `StopSignal`'s."""

  def reached_preemption(self, step):
    return False


def open_manager(directory, options):
  """The Orbax manager of one stage.

  Args:
    directory: `<workdir>/<stage>/checkpoints`; made where it is missing.
    options: `config.checkpoint` with `keep_last` (int), `best_metric` (name of
      an evaluation metric, '' for none) and `best_mode` ('max' or 'min').

  Returns:
    A `CheckpointManager` that saves in the background and keeps the best step
    and the last n.
  """
  directory = pathlib.Path(directory).absolute()
  if hosts.is_first():
    # Orbax's own way removes a torn save and what lies in it at the same time,
    # and fails where the one is faster than the other.
    for torn in directory.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*'):
      shutil.rmtree(torn, ignore_errors=True)
  policies = [checkpoint_managers.LatestN(options['keep_last'])]
  best_fn = None
  if options['best_metric']:

    def best_fn(metrics):
      return metrics[options['best_metric']]

    policies.append(
      checkpoint_managers.BestN(
        get_metric_fn=best_fn,
        reverse=options['best_mode'] == 'min',
        n=1,
        keep_checkpoints_without_metrics=False,
      )
    )
  return _Manager(
    directory,
    options=ocp.CheckpointManagerOptions(
      best_fn=best_fn,
      best_mode=options['best_mode'],
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      async_options=ocp.options.AsyncOptions(
        # Called while a finished checkpoint still waits for its name.
        post_finalization_callback=lambda: checksums.write_unnamed(
          directory, ocp.utils.TMP_DIR_SUFFIX
        )
      ),
    ),
  )


def save(manager, step, state, metrics=None):
  """Saves in the background; a step that is there already is left alone.

  Raises:
    OSError: this save or the one before it could not be written.
  """
  if step in manager.all_steps():
    return
  args = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)})
  with _write_errors(manager):
    manager.save(step, args=args, metrics=metrics)


def close(manager):
  """Finishes a save under way; raises as `save`."""
  with _write_errors(manager):
    manager.close()


@contextlib.contextmanager
def _write_errors(manager):
  """Says where and what to do, whatever kind of error Orbax passes on."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    raise OSError(
      f'a checkpoint could not be written to {manager.directory}: {error}. '
      'Those saved before are good. Free some space or lower '
      'config.checkpoint.keep_last, and give the same command again.'
    ) from error


def restore(manager, step, shapes):
  """Reads a train state back.

  Args:
    manager: from `open_manager`.
    step: one of `manager.all_steps()`.
    shapes: the state as ShapeDtypeStructs with the shardings wanted.

  Returns:
    The state, placed as `shapes` says.
  """
  args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(shapes)})
  return manager.restore(step, args=args)[STATE]


def describe(source, *, stage=None, step=None, role=None):
  """Which checkpoint of a work directory is meant.

  Args:
    source: a work directory.
    stage: name of a stage; the last finished one when None, else the last one
      that has a checkpoint.
    step: a saved step; the best when one was tracked, else the newest.
    role: 'student' or 'teacher': only stages that train it count, where there
      are some, when `stage` is None.

  Returns:
    {'stage', 'step', 'config'}, with the stage's resolved config as a dict.

  Raises:
    ValueError: no such directory, stage or step, naming those there are.
  """
  config = read_config(source)
  if not any(
    checksums.saved_steps(path) for path in pathlib.Path(source).glob(SAVED)
  ):
    raise ValueError(
      f'{source} has no finished checkpoint yet. Wait for the run, or give its '
      'command again: it goes on and saves as config.checkpoint says.'
    )
  stage = stage or _last_stage(source, config, role)
  directory = stage_dir(source, stage) / 'checkpoints'
  if not directory.is_dir():
    have = [s for s in config['stages'] if stage_dir(source, s).is_dir()]
    raise ValueError(
      f'{source} holds no checkpoint of a stage {stage!r}; it has those of '
      f'{have or "no stage"}.'
    )
  config = resolve_stage(config, stage)
  steps = sorted(checksums.saved_steps(directory))
  if step is None:
    step = _best_step(directory, steps, config['checkpoint'])
  if step not in steps:
    raise ValueError(f'{directory} has no step {step}; saved steps: {steps}.')
  return {'stage': stage, 'step': step, 'config': config}


def load_params(source, *, stage=None, step=None, role=None, ema=True):
  """Parameters of a stage of a work directory, as NumPy arrays.

  Args:
    source, stage, step: see `describe`.
    role: 'student' or 'teacher', whichever was trained when None; or 'heads',
      the layers that only a distillation has.
    ema: the average instead of the raw weights, where one was kept.

  Returns:
    (params, info): the parameters of `role`, and what `describe` says, with
    'role' and 'batch_stats', running statistics of batch norms or None.

  Raises:
    ValueError: as `describe`; the stage trained another role; or the
      checkpoint is damaged.
  """
  info = describe(source, stage=stage, step=step, role=role)
  stage, directory = info['stage'], stage_dir(source, info['stage'])
  saved = directory.absolute() / 'checkpoints' / str(info['step'])
  if damage := checksums.damage(saved):
    raise ValueError(f'{saved} is damaged: {damage}. Choose another step.')
  path = epath.Path(saved / STATE)
  # The tree on disk decides: what is restored need not be what trains now.
  reader = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
  try:
    tree = reader.metadata(path).tree
    key = 'ema' if ema and tree.get('ema') else 'params'
    # The network comes last: 'heads' is the other name there may be.
    roles = sorted(tree[key])
    if role not in (None, *roles):
      raise ValueError(
        f'stage {stage!r} of {source} trained the {roles[-1]}; it has no '
        f'{role}.'
      )
    role = role or roles[-1]
    item = {key: {role: tree[key][role]}}
    if tree.get('batch_stats'):
      item['batch_stats'] = tree['batch_stats']
    numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    params = reader.restore(
      path,
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(lambda _: numpy, item),
        partial_restore=True,
      ),
    )
  finally:
    reader.close()
  found = {'role': role, 'batch_stats': params.get('batch_stats')}
  return params[key][role], info | found


def _best_step(directory, steps, options):
  """The best of `steps` by the tracked metric, else the newest."""
  found = {}
  for step in steps:
    path = directory / str(step) / 'metrics' / 'metrics'
    if options['best_metric'] and path.is_file():
      found[step] = read_json(path)[options['best_metric']]
  if not found:
    return max(steps, default=None)
  pick = min if options['best_mode'] == 'min' else max
  return pick(found, key=found.get)


def _alone():
  """Options of an Orbax object that waits for no other process."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=index, active_processes={index}
  )


def save_params(directory, step, params, batch_stats=None):
  """Saves parameters, {role: ...}, where `load_params` finds them."""
  state = {'params': params, 'batch_stats': batch_stats}
  with ocp.CheckpointManager(pathlib.Path(directory).absolute()) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)}),
    )


def improvement(manager, options, metrics):
  """`metrics` if they are the best so far by the tracked metric, else None."""
  name = options['best_metric']
  if not name:
    return None
  if name not in metrics:
    raise ValueError(
      f'config.checkpoint.best_metric is {name!r}; evaluation gives '
      f'{sorted(metrics)}.'
    )
  best = manager.best_step()
  before = None if best is None else manager.metrics(best)
  if before is None:
    return metrics
  better = metrics[name] - before[name]
  better = -better if options['best_mode'] == 'min' else better
  return metrics if better > 0 else None


def _last_stage(source, config, role):
  """The last finished stage, else the last with a checkpoint."""

  def trained(stage):
    fields = resolve_stage(config, stage)
    return 'student' if fields['task'] == 'distill' else fields['train_role']

  names = [name for name in config['stages'] if trained(name) == role]
  names = names or list(config['stages'])
  for marker in ('result.json', 'checkpoints'):
    for name in reversed(names):
      if (stage_dir(source, name) / marker).exists():
        return name
  return names[-1]


def stage_dir(workdir, stage):
  return pathlib.Path(workdir) / stage


def resolve_stage(config, stage):
  """The config dict of one stage: the run's, with the stage's own fields.

  Args:
    config: the run's config as a dict: `stages` lists the names in order,
      `per_stage` maps a name to the fields that differ there.
    stage: a name in `stages`.

  Returns:
    A dict without those two, with `stage` set to the name.

  Raises:
    ValueError: no such stage, or a field that the config does not have.
  """
  if stage not in config['stages']:
    raise ValueError(
      f'there is no stage {stage!r}; the config has {list(config["stages"])}.'
    )
  resolved = _merge(
    {k: v for k, v in config.items() if k not in ('stages', 'per_stage')},
    config['per_stage'].get(stage, {}),
    f'per_stage.{stage}',
  )
  return resolved | {'stage': stage}


def _merge(base, changes, where):
  merged = dict(base)
  for key, value in changes.items():
    if key not in base:
      raise ValueError(
        f'config.{where}.{key} is not a field; expected one of {sorted(base)}.'
      )
    if isinstance(base[key], dict):
      value = _merge(base[key], value, f'{where}.{key}')
    merged[key] = value
  return merged


def write_json(path, value):
  """Writes JSON so that the file is either whole or the old one."""
  path = pathlib.Path(path)
  partial = path.with_name(path.name + '.partial')
  partial.write_text(json.dumps(value, indent=2) + '\n')
  os.replace(partial, path)


def read_json(path):
  return json.loads(pathlib.Path(path).read_text())


def is_workdir(path):
  """Whether a folder is that of a run, saved or not; an export is none."""
  file = pathlib.Path(path) / 'config.json'
  return file.is_file() and 'stages' in read_json(file)


def read_config(workdir):
  """The resolved config of a work directory, as a dict.

  Raises:
    ValueError: there is none.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise ValueError(
      f'{workdir} is no work directory: it has no config.json. Give the folder '
      'that was --workdir of a run.'
    )
  return read_json(path)


def claim_workdir(workdir, config):
  """Writes config.json, or checks that the run there is this one.

  A run may gain stages, and sections that came after it; stages that `config`
  lacks stay known. So several tables share the rows they have in common.

  Args:
    workdir: created where it is missing.
    config: the resolved config, a dict of JSON values.

  Raises:
    ValueError: the directory holds a run whose config differs in more than
      logging, workers, data location, sharding or checkpoint cadence.
  """
  workdir = pathlib.Path(workdir)
  config = json.loads(json.dumps(config))  # tuples become lists, as on disk
  if (workdir / 'config.json').is_file():
    before = read_config(workdir)
    before = {k: v for k, v in config.items() if isinstance(v, dict)} | before
    known = [s for s in before['stages'] if s in config['stages']]
    old, new = (_flatten(_with_stages(c, known), '.') for c in (before, config))
    missing = object()
    differing = sorted(
      name
      for name in old.keys() | new.keys()
      if old.get(name, missing) != new.get(name, missing)
      and not _free_to_change(name)
    )
    if differing:
      rows = '; '.join(
        f'config.{name} was {old.get(name, "not there")!r}, is '
        f'{new.get(name, "not there")!r}'
        for name in differing
      )
      held = (*workdir.glob(f'{SAVED}/*'), *workdir.glob('*/result.json'))
      or_else = '' if held else ', or remove it: nothing is saved there'
      raise ValueError(
        f'{workdir} holds a run with another config: {rows}. Give another '
        f'--workdir, or set these fields back{or_else}.'
      )
    gone = [s for s in before['stages'] if s not in known]
    config = config | {
      'stages': gone + config['stages'],
      'per_stage': before['per_stage'] | config['per_stage'],
    }
  workdir.mkdir(parents=True, exist_ok=True)
  if hosts.is_first():
    write_json(workdir / 'config.json', config)


def _with_stages(config, stages):
  """The config without the fields of all stages but these."""
  changes = {k: v for k, v in config['per_stage'].items() if k in stages}
  return config | {'stages': stages, 'per_stage': changes}


def _flatten(tree, sep='/'):
  """{'a/b': leaf} of nested dicts; an empty dict is a leaf."""
  return traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep=sep)


def _free_to_change(name):
  """Whether a dotted field, a stage's own too, may differ on resuming."""
  if name.startswith('per_stage.'):
    name = name.split('.', 2)[-1]
  return name.startswith(FREE_TO_CHANGE)
