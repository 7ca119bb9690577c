"""Distillation: a student learns from a frozen teacher, without labels.

Shape letters: B batch, H and W pixels, L patch tokens, M visible tokens,
D width of the student, D_t of the teacher.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from linearizer_jax import losses, masking
from linearizer_jax.tasks import inputs


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
      'form': ('auto', 'pairwise', 'linear'),
      'target_norm': ('layernorm', 'none'),
      'mask_loss': ('smooth_l1', 'cosine', 'mse'),
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
      jax.random.fold_in(key, inputs.MASK_STREAM),
      len(image),
      tokens,
      self.config.distill.mask_ratio,
    )
    return {'image': image, 'mask': mask}

  def loss(self, params, frozen, batch, key):
    """Weighted sum of the terms of a prepared batch: (loss, metrics)."""
    key = jax.random.fold_in(key, inputs.DROP_PATH_STREAM)
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
    images = inputs.normalize(batch['image'], *self.teacher_stats)
    images = inputs.resize_images(images, self.teacher_size)
    t_logits, t = self.teacher.apply({'params': frozen['teacher']}, images)
    t = jax.lax.stop_gradient(t | {'logits': t_logits})

    images = inputs.normalize(batch['image'], *self.student_stats)

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
