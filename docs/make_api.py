"""Writes docs/api.md, the public docstrings: `python docs/make_api.py`.

Reads the source without importing it, so that it needs nothing installed.
"""

import ast
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).parent.parent
OUT = ROOT / 'docs' / 'api.md'

# What a user of the parts calls, in this order: module -> its file.
MODULES = {
  'linearizer_jax.models': 'linearizer_jax/models/__init__.py',
  'linearizer_jax.models.adventurer': 'linearizer_jax/models/adventurer.py',
  'linearizer_jax.models.vit': 'linearizer_jax/models/vit.py',
  'linearizer_jax.models.teachers': 'linearizer_jax/models/teachers.py',
  'linearizer_jax.losses': 'linearizer_jax/losses.py',
  'linearizer_jax.masking': 'linearizer_jax/masking.py',
  'linearizer_jax.kernels.ssd': 'kernels/ssd/api.py',
  'linearizer_jax.kernels.causal_conv1d': 'kernels/causal_conv1d.py',
  'linearizer_jax.convert.load': 'linearizer_jax/convert/load.py',
  'linearizer_jax.convert.export': 'linearizer_jax/convert/export.py',
  'linearizer_jax.convert.tables': 'linearizer_jax/convert/tables.py',
  'linearizer_jax.data.config': 'linearizer_jax/data/config.py',
  'linearizer_jax.data.pipeline': 'linearizer_jax/data/pipeline.py',
  'linearizer_jax.checkpoint': 'linearizer_jax/checkpoint.py',
  'linearizer_jax.train': 'linearizer_jax/train.py',
  'linearizer_jax.figures': 'linearizer_jax/figures.py',
  'linearizer_jax.maps': 'linearizer_jax/maps.py',
  'linearizer_jax.label_maps': 'linearizer_jax/label_maps.py',
}
# Of these only some: the rest are layers inside the model.
ONLY = {
  'linearizer_jax.models.adventurer': {'Adventurer', 'flip_schedule'},
  'linearizer_jax.models.vit': {'ViT'},
}

HEADER = """# API

The public functions and classes with their docstrings, written by
`python docs/make_api.py`. Shape letters: B batch, L tokens, D width, H heads,
P head dim, N state, G groups, Q chunk length, K taps, V classes.

`linearizer_jax` itself has `create_model`, `features`, `list_models` (of
`linearizer_jax.models`) and `load` (of `linearizer_jax.convert.load`).
"""


def render():
  """The page as text."""
  parts = [HEADER]
  for module, file in MODULES.items():
    tree = ast.parse((ROOT / file).read_text(encoding='utf-8'))
    parts.append(f'## {module}\n\n{ast.get_docstring(tree)}\n')
    for node in tree.body:
      if _is_public(module, node):
        parts.append(_entry(node))
  return '\n'.join(parts)


def _is_public(module, node):
  return (
    isinstance(node, ast.FunctionDef | ast.ClassDef)
    and not node.name.startswith('_')
    and ast.get_docstring(node) is not None
    and node.name in ONLY.get(module, {node.name})
  )


def _entry(node):
  """Name, signature and docstring of a function, or of a class and its own."""
  lines = [f'### {node.name}\n', '```text', _signature(node)]
  lines += ['', ast.get_docstring(node), '```\n']
  return '\n'.join(lines)


def _signature(node):
  if isinstance(node, ast.ClassDef):
    return f'class {node.name}'
  return textwrap.fill(
    f'{node.name}({ast.unparse(node.args)})',
    80,
    subsequent_indent='  ',
    break_on_hyphens=False,
  )


if __name__ == '__main__':
  OUT.write_text(render(), encoding='utf-8')
