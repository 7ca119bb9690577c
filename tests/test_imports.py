"""Who may know whom (design, section 2), read from the imports."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
OURS = 'linearizer_jax'

# room -> rooms of ours it may import; others may not be named at all.
ALLOWED = {
  'kernels': {'chips', 'kernels'},
  'data': {'data'},
  'hosts': set(),
  'chips': set(),
  'checksums': {'hosts'},
  'losses': set(),
  'masking': set(),
  'metrics': set(),
  'sharding': set(),
  'optimizer': set(),
  'evaluate': set(),
  'probe': {'sharding'},
  'checkpoint': {'checksums', 'hosts'},
  'models': {'models', 'kernels'},
  'convert': {'convert', 'models', 'checkpoint', 'losses'},
  'steps': set(),
  'tasks': {'losses', 'masking', 'models', 'sharding'},
  'recorder': {'hosts', 'metrics'},
  'start': {'checkpoint', 'convert', 'models', 'tasks', 'zeroshot'},
  'figures': {'convert', 'label_maps', 'maps', 'metrics'},
  'label_maps': {
    'checkpoint',
    'convert',
    'data',
    'evaluate',
    'models',
    'tasks',
  },
  'maps': {'data', 'hosts', 'sharding', 'tasks'},
  'benchmark': {
    'chips',
    'convert',
    'figures',
    'kernels',
    'models',
    'optimizer',
    'sharding',
    'steps',
    'tasks',
  },
  'report': {'checkpoint', 'figures', 'maps', 'models', 'data', 'results'},
  'results': {'checkpoint'},
  'zeroshot': set(),
  'plan': {
    'arithmetic',
    'chips',
    'data',
    'optimizer',
    'sharding',
    'tasks',
    'traffic',
    'train',
  },
  'arithmetic': set(),
  'traffic': set(),
  'train': {
    'arithmetic',
    'checkpoint',
    'checksums',
    'chips',
    'data',
    'evaluate',
    'hosts',
    'maps',
    'optimizer',
    'probe',
    'recorder',
    'sharding',
    'start',
    'steps',
    'tasks',
  },
}


def room_of(path):
  """'models' for linearizer_jax/models/vit.py, 'train' for train.py."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return parts[0] if parts[0] != OURS else parts[1]


def imported(path):
  """Full names of everything a file imports, at any depth of nesting."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      # A relative import stays in its room: every room is one folder.
      base = f'{OURS}.{room_of(path)}' if node.level else node.module
      for alias in node.names:
        yield f'{base}.{alias.name}'


def files():
  for folder in (OURS, 'kernels'):
    yield from sorted((ROOT / folder).rglob('*.py'))


def test_rooms_know_only_who_they_may():
  wrong = []
  for path in files():
    room = room_of(path)
    if room == '__init__':
      continue
    for name in imported(path):
      parts = name.split('.')
      if parts[0] in ('configs', 'main', 'tests'):
        wrong.append(f'{path.name} imports {name}')
      if parts[0] == OURS and parts[1] not in ALLOWED[room] | {room}:
        wrong.append(f'{path.name} imports {name}')
  assert not wrong


def test_kernels_import_jax_alone():
  known = set(sys.stdlib_module_names) | {'jax', 'numpy', OURS}
  wrong = []
  for path in (ROOT / 'kernels').rglob('*.py'):
    # The comparison runs peers, and knows the peaks of chips.
    compares = path.parent.name == 'compare'
    for name in imported(path):
      first = name.split('.')[0]
      if first not in known and not (compares and first in ('torch', 'triton')):
        wrong.append(f'{path.name} imports {name}')
      if name.startswith(f'{OURS}.chips') and not compares:
        wrong.append(f'{path.name} imports {name}')
  assert not wrong


def test_configs_import_ml_collections_alone():
  wrong = [
    f'{path.name} imports {name}'
    for path in (ROOT / 'configs').glob('*.py')
    for name in imported(path)
    if name.split('.')[0] not in ('configs', 'ml_collections')
  ]
  assert not wrong


def test_the_package_loads_neither_torch_nor_tensorflow():
  code = (
    'import sys, linearizer_jax, linearizer_jax.train, linearizer_jax.report;'
    "print([m for m in ('torch', 'tensorflow', 'tensorflow_datasets',"
    " 'sklearn', 'matplotlib') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  assert done.stdout.strip() == '[]'


def test_a_source_folder_without_editable_install_says_so():
  code = (
    'import sys;'
    "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)];"
    'import linearizer_jax'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode
  assert 'pip install -e .' in done.stderr.splitlines()[-1]


def test_importing_the_data_is_light():
  heavy = ['tensorflow', 'tensorflow_datasets', 'torch', 'sklearn']
  code = (
    'import sys; import linearizer_jax.data.pipeline; '
    f'print([name for name in {heavy} if name in sys.modules])'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'
