"""Planning a run for TPU chips that are not there."""

import importlib.util
import json

import jax
import ml_collections
import pytest

from configs import distill_base
from linearizer_jax import checkpoint, chips, plan, traffic
from linearizer_jax.benchmark import distill

KEYS = {
  'memory_bytes_per_chip',
  'flops',
  'bytes',
  'hbm_bytes',
  'step_seconds_bound',
  'images_per_second',
  'hours',
  'max_batch_per_chip',
}


def stage(argument='smoke', **changes):
  config = distill_base.get_config(argument).to_dict() | changes
  return checkpoint.resolve_stage(config, 'distill')


@pytest.fixture
def compiler(monkeypatch):
  """A compiler of four chips that need 100 bytes and 30 per image."""
  compiled = []

  def compile_(config, devices, batch, memory):
    compiled.append(batch)
    held = 100 + 30 * batch
    sources = {('Adventurer/layers/mixer', 'forward'): 10**8 * batch}
    found = held, 2e12 * batch, 1e9 * batch, sources
    return found if held <= memory else None

  chip = chips.Chip(flops=1e14, bandwidth=1e11, memory=1000)
  monkeypatch.setattr(plan, '_slice', lambda topology: (chip, range(4)))
  monkeypatch.setattr(plan, '_compile', compile_)
  return compiled


def test_the_largest_batch_is_found_and_confirmed(compiler, capsys):
  result = plan.plan(stage(batch_size=64), 'v5e:2x2')
  assert result['batch_per_chip'] == 16
  assert result['configured_batch_fits']
  assert result['max_batch_per_chip'] == 30
  assert sorted(compiler) == [8, 16, 30]
  # Compute-bound: 32 TFLOP a chip at 100 TFLOP/s.
  assert result['step_seconds_bound'] == pytest.approx(0.32)
  assert result['hbm_bytes'] == 1.6e9
  assert result['images_per_second'] == pytest.approx(200)
  assert result['hours'] == pytest.approx(3 * 0.32 / 3600)  # 3 steps
  printed = capsys.readouterr().out
  assert '30 images a chip' in printed
  assert '1.60 GB  forward   Adventurer/layers/mixer' in printed


def test_a_batch_that_does_not_fit_is_halved(compiler, capsys):
  result = plan.plan(stage(batch_size=4 * 64), 'v5e:2x2')
  assert result['batch_per_chip'] == 16
  assert not result['configured_batch_fits']
  assert result['max_batch_per_chip'] == 30
  assert sorted(compiler) == [8, 16, 30, 32, 64]
  assert 'does not fit' in capsys.readouterr().out


def test_batches_can_be_split_into_the_steps_that_are_added_up(compiler):
  config = stage(batch_size=64)
  config['parallel']['accumulate_steps'] = 4
  result = plan.plan(config, 'v5e:2x2')
  assert sorted(compiler) == [8, 16, 28]
  assert result['batch_per_chip'] == 16
  assert result['max_batch_per_chip'] == 28
  assert result['images_per_second'] == pytest.approx(200)
  with pytest.raises(ValueError, match=r'is 24; .* 16 = 4 chips of v5e:2x2 x'):
    plan.plan(config | {'batch_size': 24}, 'v5e:2x2')


def test_only_what_crosses_the_memory_bus_bounds_a_step():
  chip = chips.Chip(flops=1e14, bandwidth=1e11, memory=1000)
  compiled = 500, 1e12, 9e9, {('a', 'forward'): 2e9, ('a', 'backward'): 1e9}
  config = ml_collections.ConfigDict(stage())
  found = plan._figures(config, compiled, chip, 8)
  assert found['step_seconds_bound'] == pytest.approx(0.03)


def test_what_cannot_be_planned_is_refused(compiler, monkeypatch):
  with pytest.raises(ValueError, match='batch_size is 6; it must be a mult'):
    plan.plan(stage(batch_size=6), 'v5e:2x2')
  monkeypatch.setattr(plan, '_compile', lambda *args: None)
  with pytest.raises(ValueError, match='not even one image'):
    plan.plan(stage(batch_size=8), 'v5e:2x2')


PROGRAM = """\
%body (p: (f32[8,128])) -> (f32[8,128]) {
  %p = (f32[8,128]{1,0}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=0
  %n = f32[8,128]{1,0} negate(%x), metadata={op_name="jit(f)/A/b_1/neg"}
  ROOT %t = (f32[8,128]{1,0}) tuple(%n)
}

ENTRY %main (a: bf16[16,128]) -> bf16[16,128] {
  %a = bf16[16,128]{1,0} parameter(0), metadata={op_name="state.params['x']"}
  %s = ((bf16[16,128]{1,0}), bf16[4,128]{1,0:S(1)}, s32[]) slice-start(%a)
  %d = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %v = bf16[16,128]{1,0:S(1)} fusion(%a, %d), calls=%g, \
metadata={op_name="jit(f)/transpose(jvp(A))/b_3/dot/add"}
  %w = (f32[8,128]{1,0}) while(%z), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %k = bf16[16,128]{1,0} custom-call(%v), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/A/b_1/k/call"}
}
"""


def test_traffic_counts_what_crosses_to_hbm():
  """VMEM moves nothing, a slice what it keeps, a loop its trips."""
  assert traffic.by_source(PROGRAM, depth=2) == {
    ('A/b', 'forward'): 3 * 2 * 8 * 128 * 4,
    ('A/b', 'backward'): 16 * 128 * 2,
    ('A/b', 'kernel'): 16 * 128 * 2,
    ('state.params', 'move'): 4 * 128 * 2,
  }


def test_unknown_slices_are_named():
  with pytest.raises(ValueError, match=r"--plan is 'v5e'; expected .* v5e:4x4"):
    plan.plan(stage(), 'v5e')
  with pytest.raises(ValueError, match=r"'h100:8'; .* v4, v5e, v5p, v6e"):
    plan.plan(stage(), 'h100:8')


@pytest.mark.tpu_compile
def test_a_small_step_compiles(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed')
  out = tmp_path / 'plan.json'
  result = plan.plan(stage(), 'v5e:2x2', out)
  assert json.loads(out.read_text()) == result
  assert set(result) >= KEYS
  assert result['batch_per_chip'] == 2
  # Products of a chip's two images; its kernels pad shapes so small.
  network = distill.Case(distill_base.get_config('smoke'), jax.devices()[0])
  method = 2e9 * network.row()['gflop_per_image']
  assert method < result['flops'] < 3 * method
  # Parameters and two moments, float32, and more.
  assert result['memory_bytes_per_chip'] > 3 * 4 * 50_000
  assert result['max_batch_per_chip'] > 2
