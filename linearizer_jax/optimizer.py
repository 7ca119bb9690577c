"""AdamW with the decay rules, schedule and layer-wise rates of the recipe."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Not decayed although they have more than one axis (method: decay rules).
NO_DECAY = (
  'pos_embed',
  'cls_token',
  'mask_token',
  'class_embedding',
  'positional_embedding',
  'registers',
)
BLOCK = re.compile(r'^(?:layers|resblocks)_(\d+)$')
EMBEDDINGS = ('patch_embed', 'conv1', 'ln_pre', *NO_DECAY)


def learning_rates(config, total_steps, steps_per_epoch):
  """Learning rate of each update: linear warm-up, then cosine to `final_lr`.

  Args:
    config: with `optimizer.learning_rate`, `schedule.warmup_epochs` and
      `schedule.final_lr`.
    total_steps: updates of the stage.
    steps_per_epoch: updates in one epoch, float.

  Returns:
    float32 NumPy array (total_steps,).

  Raises:
    ValueError: the warm-up is as long as the run.
  """
  if not total_steps:  # of an evaluation
    return np.zeros(0, np.float32)
  warmup = round(config.schedule.warmup_epochs * steps_per_epoch)
  if warmup >= total_steps:
    raise ValueError(
      f'warm-up takes {warmup} of {total_steps} updates; lower '
      'config.schedule.warmup_epochs or raise config.epochs (or config.steps, '
      'which goes before it).'
    )
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0 if warmup else config.optimizer.learning_rate,
    peak_value=config.optimizer.learning_rate,
    warmup_steps=warmup,
    decay_steps=total_steps,
    end_value=config.schedule.final_lr,
  )
  return np.asarray(schedule(jnp.arange(total_steps)), np.float32)


def make_optimizer(config):
  """clip -> Adam -> decoupled decay -> layer-wise rates -> descent.

  The learning rate is not in it: the train step takes it as an argument, so
  that stages which differ in rate or length are one program.

  Args:
    config: with `optimizer.{b1, b2, eps, weight_decay, clip_norm,
      layer_decay}`; clip_norm 0 means no clipping.

  Returns:
    An `optax.GradientTransformation`; its updates are for a rate of 1.
  """
  options = config.optimizer
  parts = []
  if options.clip_norm:
    parts.append(optax.clip_by_global_norm(options.clip_norm))
  parts += [
    optax.scale_by_adam(options.b1, options.b2, options.eps),
    optax.add_decayed_weights(options.weight_decay, mask=decay_mask),
  ]
  if options.layer_decay != 1.0:
    parts.append(scale_by_layer(options.layer_decay))
  parts.append(optax.scale(-1.0))
  return optax.chain(*parts)


def decay_mask(params):
  """True where weight decay applies: matrices and kernels, not embeddings."""

  def decays(path, leaf):
    return leaf.ndim > 1 and path[-1].key not in NO_DECAY

  return jax.tree_util.tree_map_with_path(decays, params)


def scale_by_layer(decay):
  """Multiplies updates by decay ** (layers above), as BEiT's fine-tuning does.

  Embeddings are layer 0, block n is layer n + 1, final norm and head are the
  layer above the last block, with factor 1.
  """

  def update(updates, state, params=None):
    del params
    rates = layer_rates(updates, decay)
    return jax.tree.map(
      lambda u, r: u * jnp.asarray(r, u.dtype), updates, rates
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def layer_rates(params, decay):
  """Tree of floats: the factor of each parameter's learning rate."""
  paths = jax.tree_util.tree_flatten_with_path(params)[0]
  layers = {_layer(path) for path, _ in paths} - {None}
  top = max(layers, default=0) + 1

  def rate(path, _):
    layer = _layer(path)
    return decay ** (top - (top if layer is None else layer))

  return jax.tree_util.tree_map_with_path(rate, params)


def _layer(path):
  """Layer number of a parameter path, None for what lies above the blocks."""
  for entry in path:
    if match := BLOCK.match(entry.key):
      return int(match.group(1)) + 1
    if entry.key in EMBEDDINGS:
      return 0
  return None
