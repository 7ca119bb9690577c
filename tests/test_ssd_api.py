"""Which implementation of the scan is taken, and what is refused."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ssd import make_case

from linearizer_jax.kernels.ssd import api, ssd


def fake_mesh(platform, shards=1):
  device = types.SimpleNamespace(platform=platform)
  return types.SimpleNamespace(
    devices=np.array([device] * shards),
    axis_names=('data',),
    shape={'data': shards},
  )


@pytest.fixture
def chosen(monkeypatch):
  """Names of the implementations that were called, which do nothing."""
  names = []
  for name in api.IMPLEMENTATIONS:

    def spy(x, *_, name=name, **options):
      names.append(name)
      return x, None

    monkeypatch.setitem(api.IMPLEMENTATIONS, name, spy)
  api._log_choice.cache_clear()
  return names


def test_implementation_follows_the_platform(chosen, caplog):
  args, _, _ = make_case(3)
  caplog.set_level(logging.INFO, 'linearizer_jax')
  for _ in range(2):
    for platform, name in api.DEFAULT_IMPLEMENTATION.items():
      ssd(**args, mesh=fake_mesh(platform))
      assert chosen.pop() == name
    ssd(**args, mesh=fake_mesh('another'))
    assert chosen.pop() == 'xla'
  on_cpu = jax.tree.map(jnp.asarray, args)
  ssd(**on_cpu)
  assert chosen.pop() == api.DEFAULT_IMPLEMENTATION['cpu']
  with jax.default_device(jax.devices()[1]):
    jax.eval_shape(ssd, **on_cpu)
  assert chosen.pop() == api.DEFAULT_IMPLEMENTATION['cpu']
  for name in api.IMPLEMENTATIONS:  # a name is traced whatever the platform
    ssd(**args, mesh=fake_mesh('tpu'), implementation=name)
    assert chosen.pop() == name

  messages = [record.getMessage() for record in caplog.records]
  assert len(messages) == len(set(messages)) == 4


def test_what_the_tpu_kernel_cannot_do_is_left_to_xla(chosen, caplog):
  args, _, _ = make_case(3)
  caplog.set_level(logging.INFO, 'linearizer_jax')
  narrow = {k: args[k][..., :12] for k in ('B', 'C', 'initial_state')}
  ssd(**(args | narrow), mesh=fake_mesh('tpu'))
  ssd(**args, mesh=fake_mesh('tpu', shards=3), batch_axes='data')
  ssd(**args, mesh=fake_mesh('tpu', shards=2), batch_axes='data')
  assert chosen == ['xla', 'xla', 'pallas_tpu']
  messages = [record.getMessage() for record in caplog.records]
  assert '12' in messages[0]
  assert 'batch 2 on 3 shards' in messages[1]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': np.ones((3, 4, 8), 'f')}, r'x must be .* \(3, 4, 8\)'),
    ({'dt': np.ones((2, 4, 4), 'f')}, r'dt .* \(2, 4, 4\), .* \(2, 3, 4\)'),
    ({'A': np.ones(3, 'f')}, r'A .* \(3,\), expected \(4,\)'),
    ({'B': np.ones((2, 3, 3, 16), 'f')}, r'G must divide H: .* \(2, 3, 3, 16'),
    ({'B': np.ones((2, 3, 16), 'f')}, r'B must be .* \(2, 3, 16\)'),
    ({'C': np.ones((2, 3, 1, 8), 'f')}, r'C .* \(2, 3, 1, 8\), .* 1, 16\)'),
    ({'D': np.ones(8, 'f')}, r'D .* \(8,\), expected \(4,\) or \(4, 8\)'),
    ({'initial_state': np.ones((2, 4, 16, 8), 'f')}, r'initial_state .* 16, 8'),
    ({'x': np.ones((2, 3, 4, 8), 'int32')}, 'x has dtype int32'),
    ({'C': np.ones((2, 3, 1, 16), 'float16')}, 'C has dtype float16'),
    ({'dt': np.ones((2, 3, 4), 'float64')}, 'dt has dtype float64'),
    ({'chunk_size': 0}, 'chunk_size must be at least 1, got 0'),
    ({'implementation': 'triton'}, "'triton' is not one of .*'reference'"),
    ({'batch_axes': 'data'}, 'batch_axes .*data.* mesh'),
    (
      {'mesh': fake_mesh('cpu'), 'batch_axes': ('data', 'fsdp')},
      "fsdp.* axes are .'data'",
    ),
  ],
)
def test_wrong_arguments(change, message):
  args, _, _ = make_case(3)
  with pytest.raises(ValueError, match=message):
    ssd(**(args | change))
