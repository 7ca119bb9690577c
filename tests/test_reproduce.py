"""docs/reproduce.md: every command in it resolves."""

import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import tables
from linearizer_jax import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / 'docs' / 'reproduce.md').read_text()
COMMANDS = re.findall(r'`(python main\.py [^`]*)`', TEXT)
# Commands of these wait for their config.
SEGMENTATION = ('configs/segment_ade20k.py', 'configs/segment_cityscapes.py')


@pytest.mark.parametrize('command', COMMANDS)
def test_command_resolves(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  path = re.search(r'--config=([^ :]+)', command)[1]
  if path in SEGMENTATION and not pathlib.Path(path).is_file():
    pytest.skip(f'{path} is not there')
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values)
  for name in ('workdir', 'plan', 'out'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  arguments = shlex.split(command)[1:]
  monkeypatch.setattr(sys, 'argv', arguments)  # where overrides are looked for
  assert values(arguments) == ['main.py']
  config = values.config.to_dict()
  for stage in config['stages']:
    checkpoint.resolve_stage(config, stage)


def test_every_number_and_table_has_its_row():
  paper = (84.7, 82.6, 84.3, 85.3, 85.0, 83.1, 85.2, 51.3, 47.8, 81.8, 82.0)
  for number in paper:
    assert f' {number} ' in TEXT, number
  for table in tables.TABLES:
    assert re.search(rf':table={table}[ ,]', TEXT), table
  assert len(COMMANDS) > 20


def test_a_run_starts_from_one_that_is_named():
  """`--config.init=runs/x` needs a command with `--workdir=runs/x`."""
  made = set(re.findall(r'--workdir=(runs/\S+)', ' '.join(COMMANDS)))
  assert set(re.findall(r'--config\.init=(runs/\S+)', TEXT)) <= made
