"""The train and the evaluation step, made of a task: pure functions.

A task (linearizer_jax/tasks) says what is trained and on which loss;
`make_train_step` and `make_eval_step` turn it into functions of (state,
frozen, batch, key, rate). `frozen` holds what is used and never trained: the
teacher's variables.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


class TrainState(flax.struct.PyTreeNode):
  """All that training changes, and all that a checkpoint holds of it.

  Attributes:
    step: int32 scalar, number of updates taken; one that was left out because
      it was not finite does not count.
    params: {'student': ..., 'heads': ...}; 'teacher' where a teacher trains.
    opt_state: of the optimizer.
    ema: exponential moving average of `params`, or None.
    batch_stats: running statistics of batch norms, or None; used with `params`
      and with `ema`.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  batch_stats: Any = None


def constants(state, frozen):
  """What a task sees and does not train: `frozen`, and batch statistics."""
  if state.batch_stats is None:
    return frozen
  return frozen | {'batch_stats': state.batch_stats}


def make_train_step(
  task, optimizer, *, accumulate_steps=1, ema_decay=0.0, skip_nonfinite=False
):
  """One update: (state, frozen, batch, key, rate) -> (state, metrics).

  The step number is folded into the key, so that a resumed run draws what the
  uninterrupted one would have drawn.

  Args:
    task: one of linearizer_jax/tasks.
    optimizer: an `optax.GradientTransformation`; its updates are multiplied by
      `rate`, the learning rate.
    accumulate_steps: the batch is taken in so many parts, one after the other;
      gradients are averaged.
    ema_decay: of `state.ema`; 0 keeps none.
    skip_nonfinite: where loss or gradient is not finite the state stays as it
      was, step number included.

  Returns:
    The function; metrics are float32 scalars, and 'updates', the int32 step
    number after it. The running statistics that a task with batch norm gives
    among its metrics, as 'batch_stats', go to the state; of micro-steps, their
    mean.
  """
  value_and_grad = jax.value_and_grad(task.loss, has_aux=True)

  def gradients(params, frozen, batch, key):
    if accumulate_steps == 1:
      (_, metrics), grads = value_and_grad(params, frozen, batch, key)
      return grads, metrics

    def part(carry, inputs):
      index, batch = inputs
      part_key = jax.random.fold_in(key, index)
      (_, metrics), grads = value_and_grad(params, frozen, batch, part_key)
      return jax.tree.map(jnp.add, carry, (grads, metrics)), None

    # Strided parts: each device keeps its own rows.
    parts = jax.tree.map(
      lambda x: jnp.moveaxis(
        x.reshape(-1, accumulate_steps, *x.shape[1:]), 1, 0
      ),
      batch,
    )
    one = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(value_and_grad, params, frozen, one, key)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), (shapes[1], shapes[0][1])
    )
    total, _ = jax.lax.scan(part, zeros, (jnp.arange(accumulate_steps), parts))
    return jax.tree.map(lambda x: x / accumulate_steps, total)

  def train_step(state, frozen, batch, key, rate):
    key = jax.random.fold_in(key, state.step)
    batch = task.prepare(batch, key)
    seen = constants(state, frozen)
    grads, metrics = gradients(state.params, seen, batch, key)
    batch_stats = metrics.pop('batch_stats', None)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda x: rate.astype(x.dtype) * x, updates)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay:
      # Young averages forget faster, or they would remember the start.
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(params, ema, 1 - decay)
    metrics |= {
      'gradient_norm': optax.tree.norm(grads),
      'parameter_norm': optax.tree.norm(params),
    }
    new = TrainState(state.step + 1, params, opt_state, ema, batch_stats)
    if skip_nonfinite:
      finite = jnp.isfinite(metrics['loss'] + metrics['gradient_norm'])
      new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    return new, metrics | {'updates': new.step}

  return train_step


def make_eval_step(task):
  """(params, frozen, batch, key) -> sums over the valid images, and 'count'.

  A metric is an array (B, ...), summed over B. Padded images
  (`batch['valid']` False) count nothing.
  """

  def eval_step(params, frozen, batch, key):
    values = task.evaluate(params, frozen, batch, key)
    valid = batch['valid']

    def total(value):
      rows = valid.reshape(-1, *(1,) * (value.ndim - 1))
      return jnp.sum(jnp.where(rows, value, 0), axis=0)

    sums = {name: total(value) for name, value in values.items()}
    return sums | {'count': valid.sum()}

  return eval_step


def make_features_step(task):
  """(params, batch) -> features of the images, with 'label' and 'valid'."""

  def features_step(params, batch):
    kept = {name: batch[name] for name in ('label', 'valid')}
    return task.features(params, batch['image']) | kept

  return features_step
