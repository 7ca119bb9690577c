"""What one update computes: tasks, and the train step made of a task.

A task says what is trained and on which loss; `make_train_step` and
`make_eval_step` turn it into pure functions of (state, frozen, batch, key).
`frozen` holds what is used and never trained: the teacher's variables.

Shape letters: B batch, H and W pixels, L patch tokens, M visible tokens,
D width of the student, D_t of the teacher, V classes.
"""

import dataclasses
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from linearizer_jax import losses, masking

# A task folds these into the step's key, so that streams never meet.
MASK_STREAM, DROP_PATH_STREAM, MIX_STREAM = range(3)


class TrainState(flax.struct.PyTreeNode):
  """All that training changes, and all that a checkpoint holds of it.

  Attributes:
    step: int32 scalar, number of updates taken.
    params: {'student': ..., 'heads': ...}; 'teacher' where a teacher trains.
    opt_state: of the optimizer.
    ema: exponential moving average of `params`, or None.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any


def normalize(images, mean, std):
  """uint8 (B, H, W, 3) to float32, (image / 255 - mean) / std per channel."""
  mean, std = jnp.asarray(mean) * 255, jnp.asarray(std) * 255
  return (images.astype(jnp.float32) - mean) / std


def resize_images(images, size):
  """Bicubic, antialiased resize of float images (B, H, W, 3) to (h, w)."""
  if images.shape[1:3] == tuple(size):
    return images
  shape = (images.shape[0], *size, images.shape[3])
  return jax.image.resize(images, shape, 'cubic', antialias=True)


def stage_blocks(depth, num_stages, network):
  """Names of the blocks after which the stages end.

  Stage k = 1..K ends after block round(k * depth / K) - 1, counted from 0.

  Raises:
    ValueError: K is below 1 or above the depth of `network`.
  """
  if not 1 <= num_stages <= depth:
    raise ValueError(
      f'config.distill.num_stages is {num_stages}; the {network} has {depth} '
      f'blocks, so it must lie between 1 and {depth}.'
    )
  return [
    f'block{round(k * depth / num_stages) - 1:02d}'
    for k in range(1, num_stages + 1)
  ]


@dataclasses.dataclass(frozen=True)
class Classify:
  """Cross-entropy of one network against labels.

  Attributes:
    model: the network; `role` its key in the parameters.
    role: 'student' or 'teacher'.
    mean, std: of the network's input.
    config: with `classify.{label_smoothing, mixup, cutmix}`.
  """

  model: nn.Module
  role: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  config: Any

  def init(self, key, image_shape):
    """Parameters {role: ...} for uint8 images of shape (H, W, 3)."""
    images = jnp.zeros((1, *image_shape))
    return {self.role: self.model.init(key, images)['params']}

  def init_frozen(self, key):
    """Nothing is frozen."""
    del key
    return {}

  def prepare(self, batch, key):
    """Adds one-hot 'target' (B, V), smoothed, with mixup or cutmix."""
    options = self.config.classify
    target = jax.nn.one_hot(batch['label'], self.model.num_classes)
    target = optax.smooth_labels(target, options.label_smoothing)
    images = normalize(batch['image'], self.mean, self.std)
    if options.mixup or options.cutmix:
      images, target = mix_images(
        jax.random.fold_in(key, MIX_STREAM),
        images,
        target,
        options.mixup,
        options.cutmix,
      )
    return {'image': images, 'target': target}

  def loss(self, params, frozen, batch, key):
    """Mean cross-entropy of a prepared batch: (loss, metrics)."""
    del frozen
    logits, _ = self.model.apply(
      {'params': params[self.role]},
      batch['image'],
      train=True,
      rngs={'drop_path': jax.random.fold_in(key, DROP_PATH_STREAM)},
    )
    loss = optax.softmax_cross_entropy(logits, batch['target']).mean()
    hits = logits.argmax(-1) == batch['target'].argmax(-1)
    return loss, {'loss': loss, 'accuracy': 100 * hits.mean()}

  def evaluate(self, params, frozen, batch, key):
    """Per-image {'loss', 'accuracy', 'top5'}, (B,) float32, in percent."""
    del frozen, key
    images = normalize(batch['image'], self.mean, self.std)
    logits, _ = self.model.apply({'params': params[self.role]}, images)
    label = batch['label']
    top5 = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    return {
      'loss': optax.softmax_cross_entropy_with_integer_labels(logits, label),
      'accuracy': 100.0 * (logits.argmax(-1) == label),
      'top5': 100.0 * (top5 == label[:, None]).any(-1),
    }


@dataclasses.dataclass(frozen=True)
class Distill:
  """ViT-Linearizer: activation matching and masked prediction (section 1).

  Attributes:
    student, teacher: networks with the `out` dict; only the student trains.
    student_stats, teacher_stats: (mean, std) of each network's input.
    teacher_size: (h, w) of the teacher's input, whose grid is the student's.
    config: with `distill.*`; see configs/common.py for the fields.
  """

  student: nn.Module
  teacher: nn.Module
  student_stats: tuple
  teacher_stats: tuple
  teacher_size: tuple[int, int]
  config: Any

  def init(self, key, image_shape):
    """{'student': ..., 'heads': ...}: heads map to the teacher's widths."""
    student_key, heads_key = jax.random.split(key)
    images = jnp.zeros((1, *image_shape))
    params = {'student': self.student.init(student_key, images)['params']}
    heads = {}
    for i, (name, width) in enumerate(self._head_widths().items()):
      head_key = jax.random.fold_in(heads_key, i)
      x = jnp.zeros((1, self.student.width))
      heads[name] = self._head(width).init(head_key, x)['params']
    return params | {'heads': heads}

  def init_frozen(self, key):
    """{'teacher': parameters}, random ones: the shapes, or a smoke run's."""
    images = jnp.zeros((1, *self.teacher_size, 3))
    return {'teacher': self.teacher.init(key, images)['params']}

  def check(self, num_tokens):
    """Raises ValueError for fields of `config.distill` that do not fit."""
    options = self.config.distill
    for role in ('student', 'teacher'):
      stage_blocks(getattr(self, role).depth, options.num_stages, role)
    masking.num_masked(num_tokens, options.mask_ratio)
    if options.mask_weight and not options.mask_ratio:
      raise ValueError(
        'config.distill.mask_ratio is 0, so there is nothing to predict; set '
        'it above 0, or config.distill.mask_weight to 0.'
      )
    choices = {
      'match_tokens': ('visible', 'all', 'class'),
      'target': ('raw', 'normed', 'projected'),
      'feature_stages': ('last', 'all'),
    }
    for field, allowed in choices.items():
      if options[field] not in allowed:
        raise ValueError(
          f'config.distill.{field} is {options[field]!r}; expected one of '
          f'{allowed}.'
        )
    weights = ('match', 'mask', 'feature', 'logit', 'class')
    if not any(options[f'{name}_weight'] for name in weights):
      raise ValueError('every loss of config.distill has weight 0.')

  def prepare(self, batch, key):
    """Draws each image's token mask, bool (B, L), into the batch."""
    image = batch['image']
    patch = self.student.patch_size
    tokens = (image.shape[1] // patch) * (image.shape[2] // patch)
    mask = masking.random_mask(
      jax.random.fold_in(key, MASK_STREAM),
      len(image),
      tokens,
      self.config.distill.mask_ratio,
    )
    return {'image': image, 'mask': mask}

  def loss(self, params, frozen, batch, key):
    """Weighted sum of the terms of a prepared batch: (loss, metrics)."""
    key = jax.random.fold_in(key, DROP_PATH_STREAM)
    outputs = self._forward(params, frozen, batch, key)
    return self._weigh(self._terms(params['heads'], outputs))

  def evaluate(self, params, frozen, batch, key):
    """Per-image terms and diagnostics, each (B,) float32."""
    batch = self.prepare(batch, key)
    outputs = self._forward(params, frozen, batch, None)

    def one_image(outputs):
      outputs = jax.tree.map(lambda x: x[None], outputs)
      _, metrics = self._weigh(self._terms(params['heads'], outputs))
      return metrics | self._diagnostics(params, outputs)

    return jax.vmap(one_image)(outputs)

  def _forward(self, params, frozen, batch, key):
    """Both networks' outputs: teacher 't', masked student 's', whole 'full'."""
    options = self.config.distill
    images = normalize(batch['image'], *self.teacher_stats)
    images = resize_images(images, self.teacher_size)
    t_logits, t = self.teacher.apply({'params': frozen['teacher']}, images)
    t = jax.lax.stop_gradient(t | {'logits': t_logits})

    images = normalize(batch['image'], *self.student_stats)

    def student(mask, stream):
      rngs = {}
      if key is not None:
        rngs = {'drop_path': jax.random.fold_in(key, stream)}
      logits, out = self.student.apply(
        {'params': params['student']},
        images,
        token_mask=mask,
        train=key is not None,
        rngs=rngs,
      )
      return out | {'logits': logits}

    masked = options.mask_ratio > 0
    outputs = {'t': t, 'mask': batch['mask']}
    if options.match_weight or options.mask_weight:
      outputs['s'] = student(batch['mask'] if masked else None, 0)
    if self._needs_whole_image():
      whole = not masked and 's' in outputs
      outputs['full'] = outputs['s'] if whole else student(None, 1)
    return outputs

  def _terms(self, heads, outputs):
    """Every loss with a weight: {name: float32 scalar}."""
    options = self.config.distill
    t, mask = outputs['t'], outputs['mask']
    terms = {}
    if options.match_weight:
      for k, (t_set, s_set) in enumerate(self._stage_sets(outputs), 1):
        terms[f'match_stage{k}'] = self._match(t_set, s_set)
    if options.mask_weight:
      _, masked = masking.split_indices(mask, self._num_masked(mask))
      target = self._target(t)
      tokens = masking.gather_tokens(outputs['s']['normed'], masked)
      terms['predict'] = losses.masked_prediction(
        self._apply_head('predict', heads, tokens, target.shape[-1]),
        masking.gather_tokens(target, masked),
        loss=options.mask_loss,
        target_norm=options.target_norm,
      )
    if options.feature_weight:
      each = [
        losses.feature_loss(
          self._apply_head(name, heads, outputs['full'][s], t[b].shape[-1]),
          t[b],
          target_norm=options.target_norm,
        )
        for name, s, b in self._feature_pairs()
      ]
      terms['feature'] = sum(each) / len(each)
    if options.logit_weight:
      terms['logit'] = losses.logit_loss(
        outputs['full']['logits'], t['logits'], options.logit_temperature
      )
    if options.class_weight:
      target = t.get('projected_class', t['class'])
      # Of the masked student where there is one: no second pass.
      token = outputs['s' if 's' in outputs else 'full']['class']
      terms['class'] = losses.class_token_loss(
        self._apply_head('class', heads, token, target.shape[-1]), target
      )
    return terms

  def _weigh(self, terms):
    """(loss, metrics) with the stages' mean as 'match'."""
    options = self.config.distill
    metrics = dict(terms)
    stages = [v for name, v in terms.items() if name.startswith('match_')]
    if stages:
      metrics['match'] = sum(stages) / len(stages)
    weights = {
      'match': options.match_weight,
      'predict': options.mask_weight,
      'feature': options.feature_weight,
      'logit': options.logit_weight,
      'class': options.class_weight,
    }
    loss = sum(w * metrics[name] for name, w in weights.items() if w)
    return loss, {'loss': loss} | metrics

  def _diagnostics(self, params, outputs):
    """What a low L_act is worth, and each loss's pull on the last block."""
    options = self.config.distill
    if 's' not in outputs:
      return {}
    found = {}
    if options.match_weight:
      for k, (t_set, _) in enumerate(self._stage_sets(outputs), 1):
        values = losses.matching_diagnostics(
          t_set[0],
          teacher_query=t_set[1],
          form=options.form,
          center=options.map_center,
        )
        found |= {f'{name}_stage{k}': v for name, v in values.items()}

    last = f'block{self.student.depth - 1:02d}'

    def term(name):
      def value(tokens):
        normed = self.student.final_norm(params['student'], tokens)
        s = outputs['s'] | {last: tokens, 'normed': normed}
        terms = self._terms(params['heads'], outputs | {'s': s})
        return self._weigh(terms)[1][name]

      return optax.tree.norm(jax.grad(value)(outputs['s'][last]))

    for name in ('match', 'predict'):
      if getattr(
        options, 'mask_weight' if name == 'predict' else 'match_weight'
      ):
        found[f'gradient_{name}'] = term(name)
    return found

  def _stage_sets(self, outputs):
    """Per stage ((tokens, query) of the teacher, the same of the student)."""
    options = self.config.distill
    t, s, mask = outputs['t'], outputs['s'], outputs['mask']
    visible, _ = masking.split_indices(mask, self._num_masked(mask))

    def pick(out, block):
      tokens = out[block]
      if options.match_tokens != 'all':
        tokens = masking.gather_tokens(tokens, visible)  # (B, M, D)
      if not options.match_class and options.match_tokens != 'class':
        return tokens, None
      class_token = out[f'{block}_class'][:, None]
      if options.match_tokens == 'class':
        return tokens, class_token
      return jnp.concatenate([tokens, class_token], axis=1), None

    names = [
      stage_blocks(network.depth, options.num_stages, role)
      for role, network in (
        ('teacher', self.teacher),
        ('student', self.student),
      )
    ]
    return [
      (pick(t, t_block), pick(s, s_block))
      for t_block, s_block in zip(*names, strict=True)
    ]

  def _match(self, t_set, s_set):
    options = self.config.distill
    return losses.activation_matching(
      t_set[0],
      s_set[0],
      teacher_query=t_set[1],
      student_query=s_set[1],
      form=options.form,
      center=options.map_center,
    )

  def _num_masked(self, mask):
    return masking.num_masked(mask.shape[1], self.config.distill.mask_ratio)

  def _needs_whole_image(self):
    o = self.config.distill
    masked = o.match_weight or o.mask_weight
    return bool(
      o.feature_weight or o.logit_weight or (o.class_weight and not masked)
    )

  def _target_name(self):
    if self.config.distill.target == 'raw':
      return f'block{self.teacher.depth - 1:02d}'
    return self.config.distill.target

  def _target(self, t):
    return t[self._target_name()]

  def _feature_pairs(self):
    """(head name, student's key, teacher's key) of the feature loss."""
    options = self.config.distill
    if options.feature_stages == 'last':
      return [('feature', 'normed', self._target_name())]
    blocks = zip(
      stage_blocks(self.student.depth, options.num_stages, 'student'),
      stage_blocks(self.teacher.depth, options.num_stages, 'teacher'),
      strict=True,
    )
    return [(f'feature_stage{k}', *b) for k, b in enumerate(blocks, 1)]

  def _head_widths(self):
    """{head name: width of what it predicts}."""
    options = self.config.distill
    images = jax.ShapeDtypeStruct((1, *self.teacher_size, 3), jnp.float32)
    key = jax.random.key(0)
    t = jax.eval_shape(
      lambda x: self.teacher.init_with_output(key, x)[0][1], images
    )
    widths = {}
    if options.mask_weight:
      widths['predict'] = self._target(t).shape[-1]
    if options.feature_weight:
      for name, _, block in self._feature_pairs():
        widths[name] = t[block].shape[-1]
    if options.class_weight:
      widths['class'] = t.get('projected_class', t['class']).shape[-1]
    return widths

  def _head(self, width):
    return nn.Dense(
      width,
      dtype=self.student.dtype,
      kernel_init=nn.initializers.normal(0.02),
    )

  def _apply_head(self, name, heads, tokens, width):
    return self._head(width).apply({'params': heads[name]}, tokens)


def mix_images(key, images, target, mixup, cutmix):
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of a batch.

  Each image is mixed with its mirror in the batch, by one share drawn for the
  whole batch; where both are on, one of them is picked with equal chance.

  Args:
    key: a JAX random key.
    images: float (B, H, W, 3).
    target: float (B, V), rows summing to 1.
    mixup, cutmix: alpha of the Beta distribution of the share; 0 turns it off.

  Returns:
    (images, target) mixed, same shapes.
  """
  pick_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 4)
  use_cutmix = jnp.asarray(bool(cutmix))
  if mixup and cutmix:
    use_cutmix = jax.random.bernoulli(pick_key)
  height, width = images.shape[1:3]
  share = jax.random.beta(mixup_key, mixup or 1.0, mixup or 1.0)
  cut = jax.random.beta(cutmix_key, cutmix or 1.0, cutmix or 1.0)
  box = _random_box(box_key, height, width, cut)  # (H, W, 1), 1 = other image
  weight = jnp.where(use_cutmix, box, 1 - share)  # of the other image
  images = images * (1 - weight) + images[::-1] * weight
  other = weight.mean()
  return images, target * (1 - other) + target[::-1] * other


def _random_box(key, height, width, keep):
  """Float mask (H, W, 1), 1 in a box of about (1 - keep) of the area."""
  side = jnp.sqrt(1 - keep)
  sizes = jnp.array([height, width])
  center = jax.random.uniform(key, (2,)) * sizes
  low = jnp.clip(jnp.round(center - side * sizes / 2), 0, sizes)
  high = jnp.clip(jnp.round(center + side * sizes / 2), 0, sizes)
  rows, columns = jnp.arange(height), jnp.arange(width)
  rows = (rows >= low[0]) & (rows < high[0])
  columns = (columns >= low[1]) & (columns < high[1])
  return (rows[:, None] & columns)[..., None].astype(jnp.float32)


def make_train_step(task, optimizer, *, accumulate_steps=1, ema_decay=0.0):
  """One update as a pure function (state, frozen, batch, key) -> (state, m).

  The step number is folded into the key, so that a resumed run draws what the
  uninterrupted one would have drawn.

  Args:
    task: `Distill` or `Classify`.
    optimizer: an `optax.GradientTransformation`.
    accumulate_steps: the batch is taken in so many parts, one after the other;
      gradients are averaged.
    ema_decay: of `state.ema`; 0 keeps none.

  Returns:
    The function; metrics are float32 scalars.
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

  def train_step(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    batch = task.prepare(batch, key)
    grads, metrics = gradients(state.params, frozen, batch, key)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
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
    state = TrainState(state.step + 1, params, opt_state, ema)
    return state, metrics

  return train_step


def make_eval_step(task):
  """(params, frozen, batch, key) -> sums over the valid images, and 'count'.

  Padded images (`batch['valid']` False) count nothing.
  """

  def eval_step(params, frozen, batch, key):
    values = task.evaluate(params, frozen, batch, key)
    valid = batch['valid']
    sums = {
      name: jnp.sum(jnp.where(valid, value, 0.0))
      for name, value in values.items()
    }
    return sums | {'count': valid.sum()}

  return eval_step
