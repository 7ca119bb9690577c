"""The notebooks: nothing but calls, no outputs, each runs in its smoke form."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ('quickstart', 'distill_on_tpu', 'export_to_pytorch')


def cells(name, kind='code'):
  """Cells of a notebook as text."""
  book = json.loads((ROOT / 'colab' / f'{name}.ipynb').read_text())
  return [''.join(c['source']) for c in book['cells'] if c['cell_type'] == kind]


def as_python(cell):
  """A cell whose shell lines, '!command', are calls of `shell`."""
  return re.sub(
    r'^( *)!(.+)$',
    lambda line: f'{line[1]}shell({line[2]!r})',
    cell,
    flags=re.MULTILINE,
  )


def execute(name, folder, monkeypatch, only=None, **variables):
  """Runs the cells of a notebook from top to bottom, as a fresh kernel would.

  Args:
    name: of the notebook.
    folder: working directory; afterwards everything is as before.
    only: the first so many cells.
    **variables: of the environment.

  Returns:
    The names the notebook defined.
  """
  environment = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
  } | {key: str(value) for key, value in variables.items()}
  names = {}

  def shell(command):
    strings = {k: v for k, v in names.items() if isinstance(v, str)}
    done = subprocess.run(
      command,
      shell=True,
      env=os.environ | strings,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, f'{command}\n{done.stdout}'

  names['shell'] = shell
  with monkeypatch.context() as patch:
    patch.setattr(os, 'environ', os.environ.copy())
    patch.setattr(sys, 'path', list(sys.path))
    patch.chdir(folder)
    os.environ.update(environment)
    for n, cell in enumerate(cells(name)[:only]):
      exec(compile(as_python(cell), f'{name}.ipynb, cell {n}', 'exec'), names)
  return names


def test_every_notebook_is_tested():
  assert {path.stem for path in (ROOT / 'colab').glob('*')} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_only_calls_and_no_outputs(name):
  book = json.loads((ROOT / 'colab' / f'{name}.ipynb').read_text())
  assert book['nbformat'] == 4
  for cell in book['cells']:
    if cell['cell_type'] == 'code':
      assert not cell['outputs']
      assert cell['execution_count'] is None
  definitions = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda
  for cell in cells(name):
    for node in ast.walk(ast.parse(as_python(cell))):
      assert not isinstance(node, definitions), cell


@pytest.mark.parametrize('name', NAMES)
def test_an_old_python_is_refused(name, tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'version_info', (3, 10))
  with pytest.raises(RuntimeError, match='Change runtime type'):
    execute(name, tmp_path, monkeypatch, only=1)


def test_a_runtime_without_tpu_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr('glob.glob', lambda pattern: [])
  with pytest.raises(RuntimeError, match='has no TPU'):
    execute('distill_on_tpu', tmp_path, monkeypatch, only=1)


def test_a_place_without_clone_asks_for_the_repository(tmp_path, monkeypatch):
  with pytest.raises(RuntimeError, match='REPOSITORY'):
    execute('quickstart', tmp_path, monkeypatch, only=1)


def test_the_repository_is_cloned(tmp_path, monkeypatch):
  if not (ROOT / '.git').exists():
    pytest.skip('this is no git clone')
  execute(
    'quickstart', tmp_path, monkeypatch, only=1, LINEARIZER_REPOSITORY=ROOT
  )
  assert (tmp_path / 'linearizer_jax' / 'main.py').is_file()


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """Where the quickstart puts its run."""
  return tmp_path_factory.mktemp('notebooks') / 'digits'


@pytest.mark.slow
def test_quickstart_runs(digits, monkeypatch):
  names = execute(
    'quickstart',
    ROOT / 'colab',
    monkeypatch,
    LINEARIZER_SMOKE=1,
    WORKDIR=digits,
  )
  assert 'distilled' in names['summary']


@pytest.mark.slow
def test_distill_on_tpu_runs(tmp_path, monkeypatch):
  execute(
    'distill_on_tpu', ROOT, monkeypatch, LINEARIZER_SMOKE=1, WORKDIR=tmp_path
  )
  result = json.loads((tmp_path / 'finetuned/finetune/result.json').read_text())
  assert 'ema_accuracy' in result


@pytest.mark.slow
def test_export_to_pytorch_runs(digits, tmp_path, monkeypatch):
  for module in ('torch', 'onnxruntime', 'onnxscript'):
    pytest.importorskip(module)
  names = execute(
    'export_to_pytorch',
    ROOT,
    monkeypatch,
    LINEARIZER_SMOKE=1,
    WORKDIR=digits,
    STUDENT=tmp_path / 'student',
  )
  assert names['output'].shape == (4, 10)
