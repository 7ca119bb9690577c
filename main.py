"""Runs a config: `python main.py --config=configs/distill_base.py`.

Every field can be set from the command line, `--config.batch_size=256`; what
follows a colon goes to the config file, `--config=configs/digits.py:smoke`.
"""

import argparse
import difflib
import linecache
import os
import re
import runpy
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

DEFAULT = 'configs/digits.py'  # of --config
PACKAGE = os.path.join(os.path.dirname(__file__), 'linearizer_jax', '')


def explain(argv):
  """Exits with one line where the config file or a field is not there.

  Or where the file refuses what follows its colon.

  Args:
    argv: the command line, with the program first.
  """
  words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  words.add_argument('--config', default=DEFAULT)
  file = words.parse_known_args(argv)[0].config
  path, *argument = file.split(':', 1)
  if not os.path.isfile(path):
    sys.exit(f'--config={file}: there is no such file.')
  try:
    config = runpy.run_path(path, run_name='configs')['get_config'](*argument)
  except ValueError as error:
    if not is_told(error):
      raise
    sys.exit(f'--config={file}: {error}')
  known = list(_fields(config.to_dict()))
  for word in argv:
    field = re.match(r'--?(?:no)?config\.([\w.]+)', word)
    if field and field[1] not in known:
      near = difflib.get_close_matches(field[1], known, 2)
      # The second where sections have the field in common.
      near = [n for n in near if n.split('.')[-1] == near[0].split('.')[-1]]
      meant = ' or '.join(f'--config.{name}' for name in near)
      meant = f' Did you mean {meant}?' if near else ''
      sys.exit(
        f'{word}: {file} has no such field.{meant} All of them are in '
        'configs/common.py.'
      )


def _fields(config, prefix=''):
  """Names of all fields of a nested dict, with dots."""
  for name, value in config.items():
    yield prefix + name
    if isinstance(value, dict):
      yield from _fields(value, f'{prefix}{name}.')


def is_told(error):
  """Whether an error is one that a `raise` of our own tells the user.

  What Python or a library raises is a fault: its traceback is of use.
  """
  frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
  file, name = frame.f_code.co_filename, frame.f_globals.get('__name__', '')
  # What grain hands on of its workers' frames has a file, but no module.
  ours = name.split('.')[0] in ('linearizer_jax', 'configs')
  ours = ours or file.startswith(PACKAGE)
  return ours and linecache.getline(file, line).lstrip().startswith('raise ')


flags.DEFINE_string(
  'workdir',
  None,
  'Folder of the run: checkpoints, metrics, figures. The same command with the '
  'same folder goes on where the run stopped. By default runs/<config>.',
)
flags.DEFINE_string(
  'plan',
  None,
  'A TPU slice such as v5e:4x4. Instead of running, compiles the train step '
  'for it and prints memory, arithmetic, traffic and the hours they bound.',
)
flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of process 0, where a run on many hosts is neither on a TPU pod '
  'nor under SLURM, which say so themselves.',
)
flags.DEFINE_integer('num_processes', None, 'With --coordinator: how many.')
flags.DEFINE_integer('process_id', None, 'With --coordinator: which of them.')
flags.DEFINE_string('out', None, 'With --plan: a JSON file for the result.')
try:  # without --config, fields are looked up here
  config_flags.DEFINE_config_file(
    'config', DEFAULT, 'File and its argument, file.py:argument.'
  )
except (AttributeError, KeyError):
  explain(sys.argv)
  raise


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  try:
    run_stages()
  except Exception as error:
    if not is_told(error):
      raise
    sys.exit(f'main.py: {error}')


def run_stages():
  """Plans or runs what the flags say."""
  if flags.FLAGS.plan:  # the chips are not here: nothing is to look for them
    os.environ['JAX_PLATFORMS'] = 'cpu'
  # Here, not above: worker processes of the data import this file as well.
  from linearizer_jax import checkpoint, hosts, plan, report, train

  logging.set_verbosity(logging.WARNING)  # of the libraries
  if not flags.FLAGS.plan:
    hosts.join(
      flags.FLAGS.coordinator,
      flags.FLAGS.num_processes,
      flags.FLAGS.process_id,
    )
  if hosts.is_first():  # the others warn, and say nothing else
    logging.get_absl_logger().parent.getChild('linearizer_jax').setLevel('INFO')
  config = flags.FLAGS.config.to_dict()
  workdir = flags.FLAGS.workdir or _default_workdir()
  stages = [checkpoint.resolve_stage(config, s) for s in config['stages']]
  if flags.FLAGS.plan:
    plan.plan(stages[0], flags.FLAGS.plan, flags.FLAGS.out)
    return
  with hosts.ending_together():
    train.check_stages(stages)
    checkpoint.claim_workdir(workdir, config)
    programs = {}
    for stage in stages:
      train.run_stage(stage, workdir, shared=programs)
    if hosts.is_first():
      report.write(config, workdir)


def parse_flags(argv):
  """As absl does, but what is wrong ends in one line, `explain`'s if it can."""
  try:
    rest = flags.FLAGS(argv)
    _ = flags.FLAGS.config.stages  # a file that is not there is missed here
    return rest
  except flags.Error as error:
    explain(argv)
    sys.exit(f'main.py: {error}')
  except (AttributeError, KeyError, OSError):
    explain(argv)
    raise


def _default_workdir():
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  path, _, argument = name.partition(':')
  stem = os.path.splitext(os.path.basename(path))[0]
  return os.path.join('runs', '_'.join(filter(None, (stem, argument))))


def _ask_for_huge_pages():
  """Starts this process anew with glibc told to take its memory in huge pages.

  An update on a CPU takes its buffers from the system and gives them back. In
  pages of 4 kB that is up to a quarter of its time.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, sys.orig_argv)


if __name__ == '__main__':
  _ask_for_huge_pages()
  app.run(main, flags_parser=parse_flags)
