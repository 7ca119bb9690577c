"""Published peaks of accelerators, for plans and for utilisation."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of a TPU chip: bfloat16 FLOP/s, bytes/s, bytes of HBM."""

  flops: float
  bandwidth: float
  memory: int
  options: dict = dataclasses.field(default_factory=dict)


MEGACORE = {'chip_config_name': 'megacore'}  # two cores that act as one device
CHIPS = {
  'v4': Chip(275e12, 1228e9, 32 * GIB, MEGACORE),
  'v5e': Chip(197e12, 819e9, 16 * GIB),
  'v5p': Chip(459e12, 2765e9, 95 * GIB, MEGACORE),
  'v6e': Chip(918e12, 1640e9, 32 * GIB),
}
# bfloat16 FLOP/s without sparsity by the start of `device.device_kind`; of two
# that fit the longer one counts.
PEAK_FLOPS = {
  'TPU v4': CHIPS['v4'].flops,
  'TPU v5 lite': CHIPS['v5e'].flops,
  'TPU v5e': CHIPS['v5e'].flops,
  'TPU v5': CHIPS['v5p'].flops,
  'TPU v5p': CHIPS['v5p'].flops,
  'TPU v6 lite': CHIPS['v6e'].flops,
  'TPU v6e': CHIPS['v6e'].flops,
  'NVIDIA A100': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
}
# Likewise bytes/s of the device's memory.
PEAK_BANDWIDTH = {
  'TPU v4': CHIPS['v4'].bandwidth,
  'TPU v5 lite': CHIPS['v5e'].bandwidth,
  'TPU v5e': CHIPS['v5e'].bandwidth,
  'TPU v5': CHIPS['v5p'].bandwidth,
  'TPU v5p': CHIPS['v5p'].bandwidth,
  'TPU v6 lite': CHIPS['v6e'].bandwidth,
  'TPU v6e': CHIPS['v6e'].bandwidth,
  'NVIDIA A100-SXM4-40GB': 1555e9,
  'NVIDIA A100-SXM4-80GB': 2039e9,
  'NVIDIA A100-PCIE-40GB': 1555e9,
  'NVIDIA A100 80GB PCIe': 1935e9,
  'NVIDIA H100 80GB HBM3': 3350e9,
  'NVIDIA H100 PCIe': 2000e9,
  'NVIDIA H200': 4800e9,
}


def peak_flops(device):
  """bfloat16 FLOP/s of a jax device, None where the table has no row."""
  return _by_kind(PEAK_FLOPS, device)


def peak_bandwidth(device):
  """Bytes/s of a jax device's memory, None where the table has no row."""
  return _by_kind(PEAK_BANDWIDTH, device)


def _by_kind(table, device):
  names = [name for name in table if device.device_kind.startswith(name)]
  return table[max(names, key=len)] if names else None


def step_flops(step, *args):
  """FLOPs a device spends in a call of a jitted function, which it compiles.

  The compiler's own count: what is computed again in the backward pass counts
  twice, and a Pallas kernel counts what its cost estimate says.

  Args:
    step: the jitted function; a call with the same arguments finds the program.
    *args: what it is called with.
  """
  cost = step.lower(*args).compile().cost_analysis()
  return (cost or {}).get('flops', 0.0)
