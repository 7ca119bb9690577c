"""Published peaks of accelerators, for plans and for utilisation."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks: bfloat16 FLOP/s without sparsity, bytes/s, memory's bytes.

  `options` are those of a TPU topology. None is what is not known.
  """

  flops: float | None = None
  bandwidth: float | None = None
  memory: int | None = None
  options: dict = dataclasses.field(default_factory=dict)


MEGACORE = {'chip_config_name': 'megacore'}  # two cores that act as one device
CHIPS = {
  'v4': Chip(275e12, 1228e9, 32 * GIB, MEGACORE),
  'v5e': Chip(197e12, 819e9, 16 * GIB),
  'v5p': Chip(459e12, 2765e9, 95 * GIB, MEGACORE),
  'v6e': Chip(918e12, 1640e9, 32 * GIB),
}
# By the start of `device.device_kind`; of several that fit the longest counts.
DEVICE_KINDS = {
  'TPU v4': CHIPS['v4'],
  'TPU v5 lite': CHIPS['v5e'],
  'TPU v5e': CHIPS['v5e'],
  'TPU v5': CHIPS['v5p'],
  'TPU v5p': CHIPS['v5p'],
  'TPU v6 lite': CHIPS['v6e'],
  'TPU v6e': CHIPS['v6e'],
  'NVIDIA A100': Chip(312e12),
  'NVIDIA A100-SXM4-40GB': Chip(312e12, 1555e9),
  'NVIDIA A100-SXM4-80GB': Chip(312e12, 2039e9),
  'NVIDIA A100-PCIE-40GB': Chip(312e12, 1555e9),
  'NVIDIA A100 80GB PCIe': Chip(312e12, 1935e9),
  'NVIDIA H100 80GB HBM3': Chip(989e12, 3350e9),
  'NVIDIA H100 PCIe': Chip(756e12, 2000e9),
  'NVIDIA H200': Chip(989e12, 4800e9),
}


def peak_flops(device):
  """bfloat16 FLOP/s of a jax device, None where the table has no row."""
  return _chip(device).flops


def peak_bandwidth(device):
  """Bytes/s of a jax device's memory, None where the table does not say."""
  return _chip(device).bandwidth


def _chip(device):
  kind = device.device_kind
  names = [name for name in DEVICE_KINDS if kind.startswith(name)]
  return DEVICE_KINDS[max(names, key=len)] if names else Chip()
