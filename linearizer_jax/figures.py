"""Pictures of a run: loss curves and activation maps."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from linearizer_jax import hosts, metrics, sharding, tasks
from linearizer_jax.data import pipeline
from linearizer_jax.tasks import inputs


def loss_curves(workdir, path):
  """Draws the training loss of every stage of a run against its updates.

  Args:
    workdir: folder of the run, with metrics.jsonl.
    path: PNG file to write.
  """
  from matplotlib import figure

  curves = {}
  for record in metrics.read(workdir):
    if record['split'] == 'train':
      stage = curves.setdefault(record['stage'], {})
      for name, value in record.items():
        if name in ('loss', 'match', 'predict', 'feature', 'logit', 'class'):
          stage.setdefault(name, []).append((record['step'], value))
  columns = min(3, len(curves)) or 1
  rows = -(-len(curves) // columns) or 1
  canvas = figure.Figure(figsize=(4 * columns, 3 * rows), layout='constrained')
  axes = canvas.subplots(rows, columns, squeeze=False).ravel()
  for axis, (stage, lines) in zip(axes, curves.items(), strict=False):
    for name, points in lines.items():
      if name != 'loss' or len(lines) != 2:  # one term is the loss
        axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axis.set(title=stage, xlabel='update', ylabel='training loss')
    axis.set_yscale('log')
    axis.legend(frameon=False, fontsize=8)
  for axis in axes[len(curves) :]:
    axis.set_axis_off()
  canvas.savefig(path, dpi=120)


def activation_maps(images, networks, path, *, block=-1, query=None):
  """Draws which tokens each network finds similar to one token.

  The paper's Figure 3: a row per image with the image, its query patch marked,
  and the cosine of the query's feature with every other token's after one
  block, on one colour scale.

  Args:
    images: uint8 (n, H, W, 3).
    networks: {name: (Module, params, (mean, std))}.
    path: PNG file to write.
    block: index of the block, negative from the end.
    query: (row, column) of the query patch in the grid; for each image its
      brightest patch when None, which lies on the object where the ground is
      dark.
  """
  maps = {
    name: similarity(images, *network, block=block)
    for name, network in networks.items()
  }
  draw_maps(images, maps, path, query)


def map_drawer(task, mesh, data, share, count=4):
  """A function that draws the networks of a task in training.

  All processes have to call it: the networks lie on all devices.

  Args:
    task: from `tasks.make_task`.
    mesh: its mesh.
    data: the `data` section of its config, a dict.
    share: {'process_index', 'process_count'}.
    count: how many of the first images of the evaluation split.

  Returns:
    (params, frozen) -> uint8 (H, W, 3), None on processes but the first.

  Raises:
    ImportError: matplotlib is missing, said before the run begins.
  """
  import matplotlib.figure  # noqa: F401

  size = mesh.size * math.ceil(count / mesh.size)
  batches = pipeline.make_eval_batches(data, batch_size=size, **share)
  batch = sharding.global_batch(mesh, next(iter(batches)))

  def compute(params, frozen, batch):
    networks = tasks.networks(task, params, frozen)
    maps = {
      name: token_cosines(batch['image'], *network)[:count]
      for name, network in networks.items()
    }
    return batch['image'][:count], batch['valid'][:count], maps

  compute = jax.jit(compute, out_shardings=sharding.replicated(mesh))

  def draw(params, frozen):
    images, valid, maps = jax.device_get(compute(params, frozen, batch))
    if not hosts.is_first():
      return None
    maps = {name: values[valid] for name, values in maps.items()}
    with io.BytesIO() as file:
      draw_maps(images[valid], maps, file)
      return np.asarray(Image.open(file).convert('RGB'))

  return draw


def draw_maps(images, maps, path, query=None):
  """Draws `activation_maps` of cosines that are known.

  Args:
    images: uint8 (n, H, W, 3).
    maps: {name: (n, h, w, h, w)} from `similarity`.
    path: PNG file to write, a path or a file.
    query: as `activation_maps`.
  """
  from matplotlib import figure, patches

  columns = 1 + len(maps)
  canvas = figure.Figure(
    figsize=(1.7 * columns + 0.8, 1.7 * len(images) + 0.4), layout='constrained'
  )
  axes = canvas.subplots(len(images), columns, squeeze=False)
  for i, image in enumerate(images):
    for axis in axes[i]:
      axis.set(xticks=[], yticks=[])
    axes[i, 0].imshow(image)
    for axis, (name, values) in zip(axes[i, 1:], maps.items(), strict=True):
      grid = values.shape[1:3]
      row, column = query or brightest_patch(image, grid)
      shown = axis.imshow(
        values[i, row, column], cmap='magma', vmin=-0.2, vmax=1
      )
      axis.plot(column, row, 'o', color='none', markeredgecolor='white')
      if i == 0:
        axis.set_title(name, fontsize=10)
    side = image.shape[0] / grid[0], image.shape[1] / grid[1]
    corner = column * side[1] - 0.5, row * side[0] - 0.5
    axes[i, 0].add_patch(
      patches.Rectangle(
        corner, side[1], side[0], fill=False, edgecolor='red', linewidth=1.5
      )
    )
  axes[0, 0].set_title('input', fontsize=10)
  bar = canvas.colorbar(shown, ax=axes, shrink=0.8, pad=0.02)
  bar.set_label('cosine with the marked token', fontsize=9)
  canvas.savefig(path, dpi=150, format='png')


def similarity(images, model, params, stats, *, block=-1):
  """`token_cosines` of a network on its own, as a NumPy array."""

  @jax.jit
  def compute(params, images):
    return token_cosines(images, model, params, stats, block=block)

  return np.asarray(compute(params, images))


def token_cosines(images, model, params, stats, size=None, block=-1):
  """Cosines of all pairs of patch tokens after a block.

  Args:
    images: uint8 (n, H, W, 3).
    model, params: a network; `stats` the (mean, std) of its input.
    size: (H, W) of its input, that of the images when None.
    block: index of the block, negative from the end.

  Returns:
    (n, h, w, h, w), computed in float32.
  """
  images = inputs.normalize(images, *stats)
  images = inputs.resize_images(images, size or images.shape[1:3])
  _, out = model.apply({'params': params}, images)
  tokens = out[f'block{block % model.depth:02d}'].astype(jnp.float32)
  lengths = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
  tokens = tokens / jnp.maximum(lengths, 1e-6)
  cosines = jnp.einsum('nid,njd->nij', tokens, tokens, precision='highest')
  grid = tuple(side // model.patch_size for side in images.shape[1:3])
  return cosines.reshape(len(images), *grid, *grid)


def brightest_patch(image, grid):
  """(row, column) of the patch with the highest mean."""
  rows, columns = grid
  height, width = image.shape[0] // rows, image.shape[1] // columns
  means = image[: rows * height, : columns * width].reshape(
    rows, height, columns, width, -1
  )
  return np.unravel_index(means.mean((1, 3, 4)).argmax(), grid)
