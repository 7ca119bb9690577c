"""Where the arrays of a kernel's call lie: platform, mesh and batch axes."""

import math

import jax
from jax.sharding import PartitionSpec


def check_mesh(mesh, batch_axes):
  """Raises ValueError for batch axes that the mesh does not have."""
  found = axes(batch_axes)
  names = () if mesh is None else mesh.axis_names
  if missing := [a for a in found if a not in names]:
    raise ValueError(
      f'batch_axes {found} has {missing}, which the mesh does not have: its '
      f'axes are {tuple(names)}'
    )


def axes(batch_axes):
  """Axis names as a tuple."""
  if batch_axes is None:
    return ()
  return (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)


def platform(x, mesh):
  """Platform of the devices that will run this, not of this process."""
  if mesh is not None:
    return mesh.devices.flat[0].platform
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    return next(iter(x.devices())).platform
  default = jax.config.jax_default_device or jax.local_devices()[0]
  return default if isinstance(default, str) else default.platform


def shards(mesh, batch_axes):
  """Parts that a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in axes(batch_axes))


def over_batch(function, arrays, mesh, batch_axes, *, whole):
  """`function(**arrays)`, on every device for its share of the batch.

  XLA cannot shard a Pallas call itself.

  Args:
    function: takes arrays by name; what it returns has the batch first.
    arrays: name -> array with the batch first, or None.
    mesh: mesh of the devices; None calls the function as it is.
    batch_axes: axis or axes of `mesh` that the batch is split over.
    whole: names of arrays that have no batch; every device has all of them.
  """
  if mesh is None:
    return function(**arrays)
  split = PartitionSpec(batch_axes)
  specs = {name: PartitionSpec() if name in whole else split for name in arrays}
  return jax.shard_map(
    lambda arrays: function(**arrays),
    mesh=mesh,
    in_specs=(specs,),
    out_specs=split,
    check_vma=False,  # a Pallas call says nothing about varying axes
  )(arrays)
