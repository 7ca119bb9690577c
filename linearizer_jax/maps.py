"""Activation maps: which tokens a network finds alike, and their pictures."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from linearizer_jax import hosts, sharding, tasks
from linearizer_jax.data import pipeline
from linearizer_jax.tasks import inputs


def activation_maps(images, networks, path, *, blocks=(-1,), queries=None):
  """Draws how similar networks find every token to one query token.

  The paper's Figure 3: a row per image and query with the image, its query
  patch marked, and over the image the cosine of the query's feature with every
  other token's after a block, on one colour scale.

  Args:
    images: uint8 (n, H, W, 3).
    networks: {name: (Module, params, (mean, std))}.
    path: file to write; its ending says what kind.
    blocks: indices of blocks, negative from the end, one column each.
    queries: [(row, column)] of query patches in the first network's grid; for
      each image its brightest patch when None, which lies on the object where
      the ground is dark.

  Raises:
    ValueError: a query outside the grid, or a block that no network has.
  """

  def compute(model, stats):
    return jax.jit(lambda p, x: similarity(x, model, p, stats, blocks=blocks))

  maps = {
    (name, block): np.asarray(values)
    for name, (model, params, stats) in networks.items()
    for block, values in compute(model, stats)(params, images).items()
  }
  draw_maps(images, maps, path, queries)


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
    maps = {
      (name, block): values[:count]
      for name, network in tasks.networks(task, params, frozen).items()
      for block, values in similarity(batch['image'], *network).items()
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


def draw_maps(images, maps, path, queries=None):
  """Draws `activation_maps` of cosines that are known.

  Args:
    images: uint8 (n, H, W, 3).
    maps: {(name, block): (n, h, w, h, w)} from `similarity`.
    path: file to write, whose ending says what kind; or an open one, for PNG.
    queries: as `activation_maps`.
  """
  from matplotlib import figure, patches

  grid = next(iter(maps.values())).shape[1:3]
  for query in queries or ():
    if not all(0 <= q < side for q, side in zip(query, grid, strict=True)):
      raise ValueError(
        f'query {query} is not in the grid of {grid[0]} rows and {grid[1]} '
        'columns; both count from 0.'
      )
  rows = [
    (i, query)
    for i, image in enumerate(images)
    for query in (queries or [brightest_patch(image, grid)])
  ]
  columns = 1 + len(maps)
  height, width = images.shape[1:3]
  canvas = figure.Figure(
    figsize=(1.7 * columns + 0.9, 1.7 * height / width * len(rows) + 0.6),
    layout='constrained',
  )
  axes = canvas.subplots(len(rows), columns, squeeze=False)
  extent = (0, width, height, 0)
  for line, (i, (row, column)) in zip(axes, rows, strict=True):
    patch = height / grid[0], width / grid[1]
    y, x = (row + 0.5) * patch[0], (column + 0.5) * patch[1]
    grey = images[i].mean(-1)
    line[0].imshow(images[i], extent=extent)
    for color, thick in (('black', 3), ('white', 1.2)):
      corner = x - patch[1] / 2, y - patch[0] / 2
      line[0].add_patch(
        patches.Rectangle(
          corner, *patch[::-1], fill=False, edgecolor=color, linewidth=thick
        )
      )
    for axis, values in zip(line[1:], maps.values(), strict=True):
      own = values.shape[1:3]  # another patch size has another grid
      at = int(y / height * own[0]), int(x / width * own[1])
      axis.imshow(grey, cmap='gray', extent=extent)
      shown = axis.imshow(
        values[i][at],
        cmap='magma',
        vmin=-0.2,
        vmax=1,
        alpha=0.75,
        extent=extent,
        interpolation='nearest',
      )
      axis.plot(x, y, 'o', color='white', markersize=5, markeredgecolor='black')
    for axis in line:
      axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
  axes[0, 0].set_title('input', fontsize=10)
  several = len(maps) > len({name for name, _ in maps})
  for axis, (name, block) in zip(axes[0, 1:], maps, strict=True):
    title = f'{name}\nblock {block}' if several else name
    axis.set_title(title, fontsize=10)
  bar = canvas.colorbar(shown, ax=axes, shrink=0.8, pad=0.02, aspect=30)
  bar.set_label('cosine with the marked token', fontsize=9)
  canvas.savefig(path, dpi=150)


def similarity(images, model, params, stats, size=None, *, blocks=(-1,)):
  """Cosines of all pairs of patch tokens after blocks of a network.

  Args:
    images: uint8 (n, H, W, 3).
    model, params: the network; `stats` the (mean, std) of its input.
    size: (H, W) of its input, that of the images when None.
    blocks: indices of blocks, negative from the end.

  Returns:
    {index of the block: (n, h, w, h, w)}, float32.

  Raises:
    ValueError: a block that the network does not have.
  """
  wrong = [n for n in blocks if not -model.depth <= n < model.depth]
  if wrong:
    raise ValueError(f'blocks {wrong} were asked for of {model.depth}.')
  images = inputs.normalize(images, *stats)
  images = inputs.resize_images(images, size or images.shape[1:3])
  _, out = model.apply({'params': params}, images)
  grid = tuple(side // model.patch_size for side in images.shape[1:3])
  found = {}
  for n in [block % model.depth for block in blocks]:
    tokens = out[f'block{n:02d}'].astype(jnp.float32)
    lengths = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    tokens = tokens / jnp.maximum(lengths, 1e-6)
    cosines = jnp.einsum('nid,njd->nij', tokens, tokens, precision='highest')
    found[n] = cosines.reshape(len(images), *grid, *grid)
  return found


def brightest_patch(image, grid):
  """(row, column) of the patch with the highest mean."""
  rows, columns = grid
  height, width = image.shape[0] // rows, image.shape[1] // columns
  means = image[: rows * height, : columns * width].reshape(
    rows, height, columns, width, -1
  )
  return np.unravel_index(means.mean((1, 3, 4)).argmax(), grid)
