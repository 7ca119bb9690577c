"""What the documents say is so: commands, code, fields, errors, links."""

import argparse
import ast
import importlib
import inspect
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
import yaml

from configs import common
from linearizer_jax import checkpoint, sharding, tasks

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(
  path.relative_to(ROOT).as_posix()
  for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]
)
# Programs that are not ours and stand in a command of a page.
OTHERS = {'pip', 'git', 'tfds', 'tensorboard', 'gcloud', 'pre-commit', 'ruff'}


def text(page):
  return (ROOT / page).read_text(encoding='utf-8')


def blocks(page, language):
  """Fenced blocks of a language."""
  found = re.findall(rf'^```{language}\n(.*?)^```', text(page), re.M | re.S)
  return [block.replace('\\\n', ' ') for block in found]


def commands():
  """(page, words) of every command in a bash block, environment taken off."""
  for page in PAGES:
    for block in blocks(page, 'bash'):
      for line in re.split(r'\n|&&', block):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
          del words[0]
        if words:
          yield page, words


COMMANDS = list(commands())
MAIN = [(p, w[2:]) for p, w in COMMANDS if w[:2] == ['python', 'main.py']]
SCRIPTS = [
  (p, w[1:])
  for p, w in COMMANDS
  if w[0] == 'python' and w[1] != 'main.py' and w[1:3] != ['-m', 'pytest']
]

READ_FLAGS = """
import json, sys, main
from absl import flags

flags.FLAGS(sys.argv)
print(json.dumps(flags.FLAGS.config.to_dict()))
"""


def check_main(arguments):
  """The flags are accepted and every stage of the config makes a task."""
  done = subprocess.run(
    [sys.executable, '-c', READ_FLAGS, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  config = json.loads(done.stdout)
  for stage in config['stages']:
    resolved = checkpoint.resolve_stage(config, stage)
    tasks.make_task(
      ml_collections.ConfigDict(resolved), sharding.make_mesh(), 9
    )


class ParsedError(Exception):
  """The arguments of a program were accepted; it goes no further."""


def check_script(words, monkeypatch):
  """The arguments are accepted by the program's own parser."""
  parse = argparse.ArgumentParser.parse_args

  def parse_only(self, args=None, namespace=None):
    parse(self, args, namespace)
    raise ParsedError

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_only)
  if words[0] == '-m':
    words = words[1:]
    start = runpy.run_module
  else:
    words = [str(ROOT / words[0]), *words[1:]]
    start = runpy.run_path
  monkeypatch.setattr(sys, 'argv', words)
  if words[1:]:
    with pytest.raises(ParsedError):
      start(words[0], run_name='__main__')
  else:
    assert pathlib.Path(words[0]).is_file()


def name_of(row):
  return f'{row[0]}: {" ".join(row[1])}'


@pytest.mark.parametrize('row', MAIN, ids=name_of)
def test_runs_resolve(row):
  check_main(row[1])


@pytest.mark.parametrize('row', SCRIPTS, ids=name_of)
def test_programs_accept_their_arguments(row, monkeypatch):
  check_script(row[1], monkeypatch)


def test_other_commands_are_known():
  setup = text('setup.py')
  for page, words in COMMANDS:
    if words[0] in ('python', 'pip'):
      for extra in re.findall(r'\.\[(.*)\]', ' '.join(words)):
        assert all(f"'{e}': " in setup for e in extra.split(',')), (page, words)
    else:
      known = words[0] in OTHERS or (ROOT / words[0]).is_file()
      assert known, (page, words)


def test_wrong_commands_would_be_seen(monkeypatch):
  with pytest.raises(AssertionError, match='mask_ration'):
    check_main(['--config.distill.mask_ration=0.5'])
  with pytest.raises(ValueError, match='multiples of 16'):
    check_main(
      ['--config=configs/distill_base.py', '--config.data.image_size=9']
    )
  with pytest.raises(SystemExit):
    check_script(['-m', 'linearizer_jax.convert', 'export'], monkeypatch)


def test_notebooks_call_what_there_is(monkeypatch):
  names = {
    '$SMOKE': ':smoke',
    '$FINETUNE': 'configs/finetune_imagenet.py:size=small',
    '$DATASET': '--config.data.name=imagenette --config.data.data_dir=DATA',
    '$LENGTH': '--config.batch_size=64',
  }
  called = 0
  for path in (ROOT / 'colab').glob('*.ipynb'):
    for cell in json.loads(path.read_text())['cells']:
      for line in re.findall(r'^ *!(.*)', ''.join(cell['source']), re.M):
        for name, value in names.items():
          line = line.replace(name, value)
        words = [w for w in shlex.split(line) if not w.startswith('JAX_')]
        if words[:2] == ['python', 'main.py']:
          check_main(words[2:])
        elif words[:3] == ['python', '-m', 'linearizer_jax.convert']:
          check_script(words[1:], monkeypatch)
        else:
          continue
        called += 1
  assert called >= 6


# ------------------------------------------------------------------- Python


def python_blocks():
  return [(p, b) for p in PAGES for b in blocks(p, 'python')]


@pytest.mark.parametrize(
  'row', python_blocks(), ids=lambda row: f'{row[0]}: {row[1].splitlines()[0]}'
)
def test_python_compiles_and_its_names_resolve(row):
  """Imports, attributes of what was imported, keywords of the calls."""
  _, block = row
  try:
    tree = ast.parse(block)
  except SyntaxError:  # rows of a table
    tree = ast.parse(f'{{{block}}}')
  names = {}

  def find(node):
    if isinstance(node, ast.Name):
      return names.get(node.id)
    if isinstance(node, ast.Attribute):
      owner = find(node.value)
      return None if owner is None else getattr(owner, node.attr)
    return None

  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith(('linearizer_jax', 'jax', 'numpy')):
          importlib.import_module(alias.name)
          top = alias.asname or alias.name.partition('.')[0]
          names[top] = sys.modules[alias.name if alias.asname else top]
    elif isinstance(node, ast.ImportFrom) and node.module != 'modeling':
      module = importlib.import_module(node.module)
      for alias in node.names:
        if not hasattr(module, alias.name):
          importlib.import_module(f'{node.module}.{alias.name}')
        names[alias.asname or alias.name] = getattr(module, alias.name)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      find(node)
    if isinstance(node, ast.Call) and inspect.isfunction(find(node.func)):
      keywords = {k.arg: None for k in node.keywords if k.arg}
      inspect.signature(find(node.func)).bind_partial(**keywords)


def test_a_table_for_another_layout_goes_there_and_back():
  """The example of docs/own_teacher.md, run."""
  (block,) = [b for b in blocks('docs/own_teacher.md', 'python') if 'TIMM' in b]
  names = {}
  exec(block, names)
  back, params = names['back'], names['params']
  assert names['state_dict']['blocks.0.attn.qkv.weight'].shape == (96, 32)
  np.testing.assert_array_equal(
    back['resblocks_1']['mlp']['c_fc']['kernel'],
    params['resblocks_1']['mlp']['c_fc']['kernel'],
  )


# --------------------------------------------------- fields, errors, links


def fields_in(words):
  """Config fields named in a text, 'distill.mask_ratio'."""
  found = re.findall(r'\bconfig\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)', words)
  return {f for f in found if f != 'json' and not f.startswith('per_stage.')}


def unknown_fields(words):
  config = common.base()
  missing = []
  for field in fields_in(words):
    section, _, name = field.rpartition('.')
    owner = config
    for part in section.split('.') if section else ():
      owner = owner.get(part) if hasattr(owner, 'get') else None
    if owner is None or name not in owner:
      missing.append(field)
  return missing


@pytest.mark.parametrize('page', PAGES)
def test_fields_named_on_a_page_exist(page):
  assert not unknown_fields(text(page))


def messages():
  """(file, text) of every error the package raises, {} for what it inserts."""
  for folder in ('linearizer_jax', 'kernels'):
    for path in sorted((ROOT / folder).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
          for argument in node.exc.args[:1]:
            words = [
              part.value if isinstance(part, ast.Constant) else '{}'
              for part in getattr(argument, 'values', [argument])
            ]
            yield path.name, ''.join(map(str, words))


def test_errors_name_fields_that_exist():
  wrong = [(file, m) for file, m in messages() if unknown_fields(m)]
  assert not wrong


def test_every_trouble_is_an_error_of_ours():
  """A heading of the page, '...' for what varies, is found in a message."""
  headings = re.findall(r'^### `(.*)`$', text('docs/troubleshooting.md'), re.M)
  assert len(headings) >= 10
  known = [message for _, message in messages()]
  for heading in headings:
    pieces = [re.escape(piece.strip()) for piece in heading.split('...')]
    pattern = re.compile('.*'.join(filter(None, pieces)), re.DOTALL)
    assert any(pattern.search(message) for message in known), heading


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)#]+)', text(page)):
    if not target.startswith(('https://', 'http://')):
      assert (ROOT / page).parent.joinpath(target).exists(), target


# ------------------------------------------------------------ other files


def test_the_api_page_is_up_to_date():
  render = runpy.run_path(str(ROOT / 'docs' / 'make_api.py'))['render']
  message = 'docs/api.md is old: run python docs/make_api.py.'
  assert text('docs/api.md') == render(), message


def test_the_citation_file_has_what_it_must():
  citation = yaml.safe_load(text('CITATION.cff'))
  assert citation['cff-version'] == '1.2.0'
  for field in ('message', 'title', 'authors', 'version'):
    assert citation[field]
  assert (
    citation['version'] == importlib.import_module('linearizer_jax').__version__
  )
  urls = {reference['url'] for reference in citation['references']}
  for paper in ('2504.00037', '2410.07599', '2405.21060'):
    assert f'https://arxiv.org/abs/{paper}' in urls


def test_hooks_pin_the_linter_of_the_tests():
  pinned = re.search(r'ruff==[\d.]+', text('setup.py'))[0]
  hooks = yaml.safe_load(text('.pre-commit-config.yaml'))['repos'][0]['hooks']
  for hook in hooks:
    assert hook['additional_dependencies'] == [pinned]


# --------------------------------------------------------------- run for real


@pytest.mark.slow
def test_a_folder_without_labels_and_a_teacher_of_another_layout(tmp_path):
  """docs/own_data.md and docs/own_teacher.md together, in smoke form."""
  import jax
  from PIL import Image
  from safetensors.numpy import save_file

  from linearizer_jax import convert, models
  from linearizer_jax.convert import tables

  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    folder = tmp_path / 'images' / split / 'all'
    folder.mkdir(parents=True)
    for n in range(8):
      pixels = rng.integers(0, 256, (40, 56, 3), np.uint8)
      Image.fromarray(pixels).save(folder / f'{n}.png')
  teacher = models.create_model(
    'vit_tiny_patch16',
    **dict(width=64, depth=2, num_heads=4, patch_size=8, image_size=32),
  )
  images = np.zeros((1, 32, 32, 3), np.float32)
  params = jax.jit(teacher.init)(jax.random.key(0), images)['params']
  (table,) = convert.FAMILIES['vit']
  weights = tmp_path / 'model.safetensors'
  save_file(tables.to_state_dict(table, params), weights)
  done = subprocess.run(
    [
      *(sys.executable, 'main.py', '--config=configs/distill_small.py:smoke'),
      *(
        '--config.data.name=folder',
        f'--config.data.data_dir={tmp_path}/images',
      ),
      '--config.teacher.name=supervised_base_patch16',
      f'--config.teacher.weights={weights}',
      f'--workdir={tmp_path}/run',
    ],
    cwd=ROOT,
    env=dict(os.environ, XLA_FLAGS=''),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'run' / 'summary.json').is_file()
