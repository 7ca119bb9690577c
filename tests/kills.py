"""Kills a small run again and again and sees whether that changed anything.

  python tests/kills.py --kills=50

A run of tests/tiny.py that saves every other update is ended by SIGKILL at
random moments (start, updates, saves) and started again, until it is done; then
the next one. After each kill the newest finished checkpoint must be where the
next start goes on, and no process may be left; each finished run must have the
losses and the parameters of an uninterrupted one, bit for bit.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
# Before JAX is imported: keep small programs too, a start is to be short.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

import jax  # noqa: E402
from flax import traverse_util  # noqa: E402
from tiny import get_config  # noqa: E402

from linearizer_jax import checkpoint, metrics, train  # noqa: E402


def main(kills, steps, seed, workers, folder):
  """Returns a summary; raises AssertionError where a kill changed anything."""
  folder = pathlib.Path(folder)
  draw = random.Random(seed)
  config = get_config()
  config.steps = steps
  config.data.num_workers = workers
  config.checkpoint.every_steps = 0  # cadence changes no number
  began = time.monotonic()
  assert wait(start(run, config, folder / 'whole')) == 0
  whole = time.monotonic() - began
  expected = outcome(folder / 'whole')
  config.checkpoint.every_steps = 2

  done = rounds = resumed = torn = 0
  while done < kills:
    workdir = folder / f'killed{rounds}'
    rounds += 1
    while True:
      before = newest(workdir)
      child = start(run, config, workdir)
      # Of a whole run's time, so that every phase of one is hit.
      if done < kills and not ended_within(child, draw.uniform(0, 1.2 * whole)):
        os.killpg(child, signal.SIGKILL)
        wait(child)
        done += 1
        left = members(child)
        assert not left, f'processes left after a kill: {left}'
        after = newest(workdir)
        assert after >= before, f'step {before} is lost, {after} is newest'
        torn += any(workdir.glob('*/checkpoints/*tmp*'))
        resumed += before > 0
        print(f'kill {done}: went on after {before}, newest is {after}')
        continue
      assert wait(child) == 0, f'a start after {before} failed'
      break
    got = outcome(workdir)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert not list(workdir.glob('*/checkpoints/*.damaged'))
  return {
    'kills': done,
    'of runs that had been resumed': resumed,
    'in the middle of a save': torn,
    'runs finished, all bit for bit': rounds,
  }


def start(function, *args):
  """A fresh process, of its own session, that calls a function; its id.

  A fork, which spares it the imports; JAX has not looked for devices yet.
  """
  sys.stdout.flush()
  child = os.fork()
  if child:
    return child
  code = 1
  try:
    os.setsid()
    function(*args)
    code = 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(code)


def run(config, workdir):
  checkpoint.claim_workdir(workdir, config.to_dict())
  train.run_stage(checkpoint.resolve_stage(config.to_dict(), 'stage'), workdir)


def wait(child):
  """Exit status of a child, negative the signal that ended it."""
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended_within(child, seconds):
  """Whether a child ends by itself; it is not reaped."""
  until = time.monotonic() + seconds
  flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
  while time.monotonic() < until:
    if os.waitid(os.P_PID, child, flags):
      return True
    time.sleep(0.01)
  return False


def members(session):
  """Ids of the processes of a session that live a second later."""
  time.sleep(1)
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      fields = path.read_text().rpartition(')')[2].split()
    except OSError:
      continue  # it has ended
    if int(fields[3]) == session and fields[0] != 'Z':
      found.append(int(path.parent.name))
  return found


def newest(workdir):
  """The newest finished checkpoint's step, 0 where there is none."""
  paths = pathlib.Path(workdir).glob('stage/checkpoints/*')
  return max((int(p.name) for p in paths if p.name.isdigit()), default=0)


def outcome(workdir):
  """{name: array}: the loss of every update, and the final parameters."""
  assert wait(start(write_outcome, workdir)) == 0
  return dict(np.load(workdir / 'outcome.npz'))


def write_outcome(workdir):
  params, _ = checkpoint.load_params(workdir)
  arrays = traverse_util.flatten_dict(params, sep='/')
  records = [r for r in metrics.read(workdir) if r['split'] == 'train']
  arrays['steps'] = np.array([record['step'] for record in records])
  arrays['losses'] = np.array([record['loss'] for record in records])
  np.savez(workdir / 'outcome.npz', **arrays)


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--steps', type=int, default=100, help='of each run')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('--workers', type=int, default=0, help='of the data')
  parser.add_argument('--cache', help='folder of compiled programs, kept')
  options = vars(parser.parse_args())
  with tempfile.TemporaryDirectory() as temporary:
    cache = options.pop('cache') or f'{temporary}/cache'
    jax.config.update('jax_compilation_cache_dir', cache)
    print(json.dumps(main(folder=temporary, **options)))
