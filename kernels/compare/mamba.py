"""The Triton kernels of mamba_ssm, from its Python files alone."""

import importlib
import os
import pathlib
import re
import sys
import types

OLDEST = (2, 2, 5)
CHUNKS = (256, 128, 64)  # tokens; 256 is the default of its models


def find(folder):
  """(folder of the package, version) of an unpacked sdist or wheel.

  Raises:
    ValueError: there is no mamba_ssm in the folder, or one too old.
  """
  if not folder:
    raise ValueError('no folder of it was given (--mamba_ssm=DIR)')
  for package in (pathlib.Path(folder) / 'mamba_ssm', pathlib.Path(folder)):
    if (package / 'ops/triton/ssd_combined.py').is_file():
      break
  else:
    raise ValueError(
      f'--mamba_ssm={folder} has no mamba_ssm/ops/triton/ssd_combined.py; '
      'expected the folder that `tar xf mamba_ssm-2.2.5.tar.gz` makes'
    )
  text = (package / '__init__.py').read_text(encoding='utf-8')
  match = re.search(r"""__version__ = ['"]([^'"]+)""", text)
  version = match.group(1) if match else 'unknown'
  if tuple(map(int, re.findall(r'\d+', version)[:3])) < OLDEST:
    raise ValueError(
      f'--mamba_ssm={folder} is version {version}; expected '
      f'{".".join(map(str, OLDEST))} or later'
    )
  return package, version


def load(folder):
  """Its module `ops.triton.ssd_combined`.

  Packages stand in for its own, whose `__init__` files import a compiled
  extension.

  Raises:
    ValueError: from `find`.
    ImportError: torch, triton, einops or packaging is missing.
  """
  package, _ = find(folder)
  sys.modules['causal_conv1d'] = None  # optional, and compiled as well
  for name in ('', '.ops', '.ops.triton', '.utils'):
    module = types.ModuleType(f'mamba_ssm{name}')
    module.__path__ = [str(package.joinpath(*name.split('.')))]
    sys.modules[module.__name__] = module
  return importlib.import_module('mamba_ssm.ops.triton.ssd_combined')


def tuners():
  """Every kernel of the loaded modules that Triton tunes."""
  found = {}
  for name, module in list(sys.modules.items()):
    if name.startswith('mamba_ssm.ops.triton.'):
      for value in vars(module).values():
        if hasattr(value, 'configs') and hasattr(value, 'keys'):
          found[id(value)] = value
  return list(found.values())


class Compiler:
  """Compiles a share of what Triton tries, into its cache on disk.

  Tuning compiles one configuration after another. Several of these do it side
  by side beforehand; then tuning has only to time.

  Args:
    folder: of mamba_ssm.
    part, parts: which share of each kernel's configurations.
  """

  def __init__(self, folder, part, parts):
    import torch
    import triton

    os.nice(10)  # others compile as well, and are waited for
    self.torch, self.scan = torch, load(folder).mamba_chunk_scan_combined
    for tuner in tuners():
      known = tuner.configs
      tuner.configs = known[part % len(known) :: parts]

    def run_once(kernel, **_):
      kernel()
      return [0.0, 0.0, 0.0]

    triton.testing.do_bench = run_once

  def compile(self, shapes, dtype):
    """Runs each shape once, forward and backward, at every chunk size."""
    for s in shapes:
      for chunk in CHUNKS:
        ones = self._ones(s, getattr(self.torch, dtype))
        *args, D = ones
        y = self.scan(*args, chunk, D=D)
        self.torch.autograd.grad(y, ones, self.torch.ones_like(y))
        self.torch.cuda.synchronize()

  def _ones(self, s, dtype):
    torch = self.torch
    b_or_c = s.batch, s.length, s.groups, s.state_dim
    sizes = (
      ((s.batch, s.length, s.heads, s.head_dim), dtype),
      ((s.batch, s.length, s.heads), torch.float32),
      ((s.heads,), torch.float32),
      (b_or_c, dtype),
      (b_or_c, dtype),
      ((s.heads,), torch.float32),
    )
    return [
      torch.ones(size, dtype=kind, device='cuda', requires_grad=True)
      for size, kind in sizes
    ]
