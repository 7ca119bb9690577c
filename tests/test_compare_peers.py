"""Peers of the comparison without a GPU: stand-ins for mamba_ssm and CUDA."""

import math
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compare import TINY, folder  # noqa: F401 (a fixture)

from linearizer_jax.kernels.compare import counts, exact, mamba, torch_programs
from linearizer_jax.kernels.ssd.shapes import Shape

SOURCE = """
import time
import torch
from causal_conv1d_or_not import missing
from mamba_ssm.utils.torch import custom_fwd
from mamba_ssm.ops.triton.ssd_bmm import kernel

@custom_fwd
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, *,
                              dt_softplus):
  assert not dt_softplus and D is not None
  time.sleep(chunk_size**2 / 1e6)
  if chunk_size == 128 and x.requires_grad and not torch.is_grad_enabled():
    raise ValueError('not this one')
  repeats = x.shape[2] // B.shape[2]
  B, C = (a.repeat_interleave(repeats, 2) for a in (B, C))
  state, y = 0, []
  for t in range(x.shape[1]):
    decay = torch.exp(dt[:, t] * A)[..., None, None]
    update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
    state = decay * state + update
    y.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
  return torch.stack(y, 1)
""".replace(
  'from causal_conv1d_or_not import missing',
  'try:\n  import causal_conv1d\nexcept ImportError:\n  causal_conv1d = None\n'
  'assert causal_conv1d is None',
)
TUNED = """
class Tuned:
  def __init__(self):
    self.configs, self.keys = list(range(9)), ['chunk_size']

kernel = Tuned()
"""


def forget_mamba():
  for name in [n for n in sys.modules if n.startswith('mamba_ssm')]:
    del sys.modules[name]


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A folder like that of mamba_ssm, and a triton that times nothing."""
  root = tmp_path / 'mamba_ssm-2.2.5/mamba_ssm'
  (root / 'ops/triton').mkdir(parents=True)
  (root / 'utils').mkdir()
  fails = "raise ImportError('a compiled extension')\n"
  (root / '__init__.py').write_text(f'__version__ = "2.2.5"\n{fails}')
  for name in ('ops', 'ops/triton', 'utils'):
    (root / name / '__init__.py').write_text(fails)
  (root / 'utils/torch.py').write_text('custom_fwd = lambda f: f\n')
  (root / 'ops/triton/ssd_bmm.py').write_text(TUNED)
  (root / 'ops/triton/ssd_combined.py').write_text(SOURCE)
  triton = types.ModuleType('triton')
  triton.testing = types.SimpleNamespace(do_bench=lambda kernel, **_: kernel())
  monkeypatch.setitem(sys.modules, 'triton', triton)
  yield root.parent
  forget_mamba()
  sys.modules.pop('causal_conv1d', None)


class Cuda:
  """torch.cuda of a machine without one; graphs only where they are wanted."""

  def __init__(self, captures):
    self.captures, self.captured = captures, 0

  def synchronize(self):
    pass

  reset_peak_memory_stats = synchronize

  def memory_allocated(self):
    return 2**20

  def max_memory_allocated(self):
    return 3 * 2**20

  def current_stream(self):
    return types.SimpleNamespace(wait_stream=lambda other: None)

  def Stream(self):  # noqa: N802
    if not self.captures:
      raise RuntimeError('operation not permitted when stream is capturing')
    return self.current_stream()

  def stream(self, stream):
    return self

  graph = stream

  def __enter__(self):
    pass

  def __exit__(self, *error):
    self.captured += 1

  def CUDAGraph(self):  # noqa: N802
    return types.SimpleNamespace(replay=lambda: time.sleep(1e-3))


@pytest.fixture(params=[True, False])
def cuda(request, monkeypatch):
  torch = pytest.importorskip('torch')
  found = Cuda(request.param)
  monkeypatch.setattr(torch, 'cuda', found)
  monkeypatch.setattr(torch_programs.TorchProgram, 'device', 'cpu')
  return found


def test_mamba_runs_without_its_package(package, folder, cuda):  # noqa: F811
  scan = torch_programs.MambaScan(package, folder, TINY, 'float32')
  row = scan.prepare('forward+backward', seconds=1e5)
  assert max(row['errors'].values()) < 1e-5
  assert list(row['errors']) == list(exact.OUTPUTS)
  assert row['mib'] == 2
  assert set(row['tried_chunk_sizes']) == set(mamba.CHUNKS)
  assert ('operation not permitted' in row.get('note', '')) != cuda.captures
  tried = row['tried_chunk_sizes']
  assert tried[row['chunk_size']] == min(tried.values())
  assert cuda.captures or row['chunk_size'] != 256  # much the slowest here
  assert scan.sample('forward+backward') > 0
  row = scan.prepare('forward', seconds=-1)  # no time but for the first
  assert row['chunk_size'] == 256
  assert list(row['errors']) == ['y']
  row = scan.prepare('forward', seconds=1e5)
  assert row['tried_chunk_sizes'][128] == 'ValueError: not this one'
  assert row['chunk_size'] in (256, 64)


def test_mamba_is_compiled_in_shares(package, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(os, 'nice', lambda by: None)
  shares = []
  for part in range(12):
    mamba.Compiler(package, part, 12)
    (kernel,) = mamba.tuners()
    assert kernel.configs
    shares += kernel.configs
    forget_mamba()
  assert set(shares) == set(range(9))


def test_folders_that_are_not_mamba(package, tmp_path):
  assert mamba.find(package)[1] == '2.2.5'
  assert mamba.find(package / 'mamba_ssm')[1] == '2.2.5'
  with pytest.raises(ValueError, match='tar xf'):
    mamba.find(tmp_path)
  with pytest.raises(ValueError, match='no folder of it was given'):
    mamba.find(None)
  (package / 'mamba_ssm/__init__.py').write_text("__version__ = '2.2.4.post1'")
  with pytest.raises(ValueError, match=r'is version 2\.2\.4'):
    mamba.find(package)


def test_attention_in_torch_is_that_of_jax(cuda):
  shape = Shape(batch=2, length=5, heads=4, head_dim=64)
  program = torch_programs.Attention('MATH', shape, 'float32')
  row = program.prepare('forward+backward', seconds=1)
  assert 'errors' not in row
  assert program.sample('forward+backward') > 0
  y, *gradients = program.function('forward+backward')(*program.sets()[0])
  *qkv, cotangent = (jnp.asarray(a) for a in counts.draw_attention(shape))
  expected, pullback = jax.vjp(jax.nn.dot_product_attention, *qkv)
  for a, b in zip(
    (y, *gradients), (expected, *pullback(cotangent)), strict=True
  ):
    np.testing.assert_allclose(a.detach().numpy(), b, atol=1e-5)
  assert math.isclose(row['mib'], 2)
