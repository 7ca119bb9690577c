"""Where arrays live: a ('data', 'fsdp') mesh and the rules for it."""

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BATCH_AXES = ('data', 'fsdp')
# Smaller parameters are cheaper to keep whole than to gather.
MIN_FSDP_SIZE = 2**16


def make_mesh(devices=None, fsdp=1):
  """A mesh of all devices, (data, fsdp) = (devices / fsdp, fsdp).

  Args:
    devices: sequence of jax devices, of this host's backend or of a topology
      compiled for; all devices of the default backend when None.
    fsdp: number of devices that share one copy of the parameters.

  Returns:
    A `jax.sharding.Mesh` whose axes are both Auto.

  Raises:
    ValueError: the number of devices is no multiple of `fsdp`.
  """
  devices = list(jax.devices() if devices is None else devices)
  if fsdp < 1 or len(devices) % fsdp:
    raise ValueError(
      f'{len(devices)} devices cannot be split into groups of {fsdp}; change '
      'config.parallel.fsdp to a divisor of the number of devices.'
    )
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    BATCH_AXES,
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def replicated(mesh):
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
  """The leading axis is cut over all devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def with_sharding(mesh, shapes):
  """Shards each large array of a tree over 'fsdp', the rest are replicated.

  The longest axis that the group divides is cut. Optimizer moments have their
  parameter's shape and so its sharding.

  Args:
    mesh: from `make_mesh`.
    shapes: tree of anything with shape and dtype.

  Returns:
    The same tree of ShapeDtypeStructs that hold their sharding.
  """
  group = mesh.shape['fsdp']

  def place(leaf):
    axes = [i for i, n in enumerate(leaf.shape) if n % group == 0]
    spec = [None] * len(leaf.shape)
    if group > 1 and axes and math.prod(leaf.shape) >= MIN_FSDP_SIZE:
      spec[max(axes, key=lambda i: leaf.shape[i])] = 'fsdp'
    return jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=NamedSharding(mesh, PartitionSpec(*spec)),
    )

  return jax.tree.map(place, shapes)


def global_batch(mesh, batch):
  """Makes one global array of what each process holds of a batch.

  Args:
    mesh: from `make_mesh`.
    batch: dict of NumPy arrays (local batch, ...), process p holding the p-th
      slice of the global batch.

  Returns:
    The dict with jax Arrays (global batch, ...) cut over all devices.
  """
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, value)
    for key, value in batch.items()
  }


def check_batch(mesh, batch_size, accumulate_steps=1, field='batch_size'):
  """Raises ValueError where a batch cannot be cut over mesh and micro-steps."""
  parts = mesh.size * accumulate_steps
  if accumulate_steps < 1 or batch_size % parts or batch_size < parts:
    raise ValueError(
      f'config.{field} is {batch_size}; it must be a multiple of '
      f'{parts} = {mesh.size} devices x {accumulate_steps} '
      'config.parallel.accumulate_steps (at least 1).'
    )
