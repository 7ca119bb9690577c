"""Runs a config: `python main.py --config=configs/distill_base.py`.

Every field can be set from the command line, `--config.batch_size=256`; what
follows a colon goes to the config file, `--config=configs/digits.py:smoke`.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

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
config_flags.DEFINE_config_file(
  'config', 'configs/digits.py', 'File and its argument, file.py:argument.'
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
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
  app.run(main)
