"""Losses of distillation: one stage or one head each, a float32 scalar back.

Features may come in any float dtype; everything is computed in float32, and
every product asks for HIGHEST, because a float32 matmul on a TPU is made of
bfloat16 passes otherwise, with which the linear form of activation matching
goes wrong. Targets (teacher, target) are constants: no gradient reaches them.
Cross-entropy with labels is optax's.

Shape letters: B batch, M tokens of the set, R rows (queries), D width of the
student or of both, D_t width of the teacher, V classes.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

HIGHEST = lax.Precision.HIGHEST

# |x|^2 is not taken below this: lengths of 1e-6 and less count as zero.
EPS = 1e-12

# 'auto' is pairwise while R M <= PAIRWISE_LIMIT * W (R + M), W the mean of the
# two widths: always for one query, and for R = M up to M = 2.5 W, where the
# products of value and gradient cost the same. Measured on CPU, widths 64 to
# 1024, equal and not: from M = 2.4 W to 3 W.
PAIRWISE_LIMIT = 1.25


def activation_matching(
  teacher: jax.Array,
  student: jax.Array,
  *,
  teacher_query: jax.Array | None = None,
  student_query: jax.Array | None = None,
  form: str = 'auto',
  center: bool = False,
) -> jax.Array:
  """Distance between the activation maps of one stage of the two networks.

  With rows p, q (queries) and tokens f, g (teacher, student) of unit length,

      A_ij = p_i . f_j     S_ij = q_i . g_j
      L_act = mean over images, i of  1 - sum_j A_ij S_ij / (|A_i| |S_i|)

  'pairwise' forms the maps. 'linear' is the same function without them, in
  O((M + R) D^2) time and O(D^2) memory beside arrays of the features' size:

      sum_j A_ij S_ij = p_i' (F'G) q_i     |A_i|^2 = p_i' (F'F) p_i

  Source: method, section 1 (ViT-Linearizer, arXiv 2504.00037; the linear form
  and the centring are ours).

  Args:
    teacher: float (B, M, D_t), the tokens of the set. A constant.
    student: float (B, M, D), the same tokens of the student.
    teacher_query: float (B, R, D_t), the rows; by default the tokens
      themselves. For `match_tokens='class'` the class token, (B, 1, D_t).
    student_query: float (B, R, D); given exactly when `teacher_query` is.
    form: 'pairwise', 'linear', or 'auto', the one with less work: pairwise
      for a single query, and for R = M while M is at most 2.5 mean widths.
    center: subtract each image's mean token of the set first, from the
      queries too, so that both sides of A_ij are seen from the same origin.

  Returns:
    float32 scalar in [0, 2].

  Numerics:
    Float32, products at HIGHEST. Squared lengths of tokens, queries and rows
    of the maps are guarded by max(., 1e-12). A row that is zero in either
    network contributes exactly 1. The gradient at a zero row of the student
    is finite, but the two guards leave a slope of up to 1e12 / (B R) there.
    Rounding below 0 is cut from the value and not from the gradient.
    The forms differ by 4e-7 of the gradient for unrelated tokens. Where all
    tokens are alike and nothing is centred (mean cosine 0.8), the gradient is
    a small difference of large terms: 1e-5 of it is lost in the pairwise
    form, 1e-4 in the linear one.

  Raises:
    ValueError: unknown form, sets or queries that do not correspond.
  """
  _check_matching(teacher, student, teacher_query, student_query)
  teacher, teacher_query = lax.stop_gradient((teacher, teacher_query))
  p, f = _unit_rows_and_tokens(teacher, teacher_query, center)
  q, g = _unit_rows_and_tokens(student, student_query, center)
  form = _choose_form(form, p, f, q)
  products = _pairwise if form == 'pairwise' else _linear
  dot, a_squared, s_squared = products(p, f, q, g)  # (B, R)
  cosine = dot * _inverse_length(a_squared) * _inverse_length(s_squared)
  return _not_negative(jnp.mean(1 - cosine))


def matching_diagnostics(
  teacher: jax.Array,
  *,
  teacher_query: jax.Array | None = None,
  form: str = 'auto',
  center: bool = False,
) -> dict[str, jax.Array]:
  """What a low activation-matching loss is worth at this stage.

  Where all tokens of a teacher are alike, a student that has learnt nothing
  already matches it. A student with constant features has S_ij = 1, hence

      constant_student = mean over images, i of  1 - p_i . sum_j f_j /
                                                     (|A_i| sqrt(M))
      teacher_cosine   = mean over images, i != j of  f_i . f_j
                       = (|sum_j f_j|^2 - sum_j |f_j|^2) / (M (M - 1))

  With `center` a constant student has nothing left but zero rows, and its
  loss is 1. The cosine is that of the tokens as they are, never centred: it
  would be -1 / (M - 1) for any teacher whose tokens have equal lengths.
  Source: method, section 1, "known weakness".

  Args:
    teacher, teacher_query, form, center: as in `activation_matching`. Under
      the same jit its |A_i| are shared, and the rest is O(M D).

  Returns:
    {'constant_student', 'teacher_cosine'}, float32 scalars without gradient.

  Raises:
    ValueError: unknown form.
  """
  teacher, teacher_query = lax.stop_gradient((teacher, teacher_query))
  p, f = _unit_rows_and_tokens(teacher, teacher_query, False)
  form = _choose_form(form, p, f, p)
  num_tokens = f.shape[1]
  total = f.sum(1)  # (B, D_t)
  pairs = jnp.sum(total**2, -1) - jnp.sum(f**2, (1, 2))  # (B,)
  teacher_cosine = jnp.mean(pairs) / max(num_tokens * (num_tokens - 1), 1)
  if center:
    constant_student = jnp.ones((), jnp.float32)
  else:
    # The teacher matched with itself: the |A_i|^2 of `activation_matching`.
    products = _pairwise if form == 'pairwise' else _linear
    _, a_squared, _ = products(p, f, p, f)  # (B, R)
    dot = jnp.sum(p * total[:, None], -1)
    cosine = dot * _inverse_length(a_squared) * num_tokens**-0.5
    constant_student = _not_negative(jnp.mean(1 - cosine))
  return {
    'constant_student': constant_student,
    'teacher_cosine': teacher_cosine,
  }


def normalize_target(target: jax.Array, target_norm: str) -> jax.Array:
  """The teacher's tokens as a regression target.

  'layernorm': (x - mean) / sqrt(var + 1e-6) over the channels of each token,
  no affine. 'none': x. Source: method, section 1 (ours, as in MaskDistill).

  Args:
    target: float (..., D).
    target_norm: 'layernorm' or 'none'.

  Returns:
    float32 (..., D), a constant.

  Raises:
    ValueError: unknown target_norm.
  """
  target = lax.stop_gradient(target).astype(jnp.float32)
  if target_norm == 'none':
    return target
  if target_norm != 'layernorm':
    raise ValueError(
      f"target_norm is {target_norm!r}, expected 'layernorm' or 'none': "
      'change config.distill.target_norm'
    )
  # The variance from differences: E[x^2] - E[x]^2 cancels in float32.
  target = target - target.mean(-1, keepdims=True)
  return target * lax.rsqrt(jnp.mean(target**2, -1, keepdims=True) + 1e-6)


def masked_prediction(
  prediction: jax.Array,
  target: jax.Array,
  *,
  loss: str = 'smooth_l1',
  target_norm: str = 'layernorm',
) -> jax.Array:
  """Distance of the student's predictions from the teacher's tokens.

      'smooth_l1'  mean of  d^2 / 2 where |d| <= 1, else |d| - 1/2   (beta 1)
      'mse'        mean of  d^2
      'cosine'     mean of  1 - x . y / (|x| |y|) over tokens

  with d = prediction - normalize_target(target), over images, tokens and
  channels. Source: method, section 1.

  Args:
    prediction: float (B, M, D), after the linear layer to the teacher's width,
      at the masked tokens only.
    target: float (B, M, D), the teacher's tokens there. A constant.
    loss: 'smooth_l1', 'cosine' or 'mse'.
    target_norm: as in `normalize_target`.

  Returns:
    float32 scalar.

  Numerics:
    Float32. Squared lengths in 'cosine' are guarded by max(., 1e-12).

  Raises:
    ValueError: unknown loss or target_norm, shapes that differ, no token.
  """
  _check_same_shape('prediction', prediction, 'target', target)
  if prediction.shape[1] == 0:
    raise ValueError(
      'no token is masked, so there is nothing to predict: set '
      'config.distill.mask_ratio above 0 or config.distill.mask_weight to 0'
    )
  target = normalize_target(target, target_norm)
  prediction = prediction.astype(jnp.float32)
  if loss == 'smooth_l1':
    return jnp.mean(optax.losses.huber_loss(prediction, target, delta=1.0))
  if loss == 'mse':
    return jnp.mean((prediction - target) ** 2)
  if loss == 'cosine':
    return class_token_loss(prediction, target)
  raise ValueError(
    f"loss is {loss!r}, expected 'smooth_l1', 'cosine' or 'mse': change "
    'config.distill.mask_loss'
  )


def feature_loss(
  prediction: jax.Array, target: jax.Array, *, target_norm: str = 'layernorm'
) -> jax.Array:
  """Mean squared error on all tokens of an unmasked student.

  mean of (prediction - normalize_target(target))^2.
  Source: method, section 1, `feature_weight`.

  Args:
    prediction: float (B, L, D), after the linear layer to the teacher's width.
    target: float (B, L, D), the teacher's tokens. A constant.
    target_norm: as in `normalize_target`.

  Returns:
    float32 scalar.

  Raises:
    ValueError: unknown target_norm, shapes that differ.
  """
  _check_same_shape('prediction', prediction, 'target', target)
  target = normalize_target(target, target_norm)
  return jnp.mean((prediction.astype(jnp.float32) - target) ** 2)


def logit_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  temperature: float = 1.0,
) -> jax.Array:
  """Divergence from a classifier teacher's soft labels.

  T^2 mean over images of KL(softmax(teacher / T) || softmax(student / T)): 0
  for equal logits, and the gradient of the cross-entropy; T^2 keeps its size
  over temperatures (Hinton et al., arXiv 1503.02531, section 2).
  Source: method, section 1, `logit_weight`.

  Args:
    student_logits: float (B, V).
    teacher_logits: float (B, V). A constant.
    temperature: T > 0.

  Returns:
    float32 scalar.

  Raises:
    ValueError: shapes that differ.
  """
  _check_same_shape(
    'student_logits', student_logits, 'teacher_logits', teacher_logits
  )
  student, teacher = (
    jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    for logits in (student_logits, lax.stop_gradient(teacher_logits))
  )
  divergence = optax.losses.kl_divergence_with_log_targets(student, teacher)
  return temperature**2 * jnp.mean(divergence)


def class_token_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """One minus the cosine of two vectors, such as the class tokens.

  mean over all but the last axis of  1 - x . y / (|x| |y|).
  Source: method, section 1, `class_weight`.

  Args:
    student: float (..., D), after a linear layer to the teacher's width.
    teacher: float (..., D); for CLIP after its projection. A constant.

  Returns:
    float32 scalar in [0, 2].

  Numerics:
    Float32. Squared lengths are guarded by max(., 1e-12): a zero vector gives
    1 and a finite gradient.

  Raises:
    ValueError: shapes that differ.
  """
  _check_same_shape('student', student, 'teacher', teacher)
  x = _unit(student.astype(jnp.float32))
  y = _unit(lax.stop_gradient(teacher).astype(jnp.float32))
  return _not_negative(jnp.mean(1 - jnp.sum(x * y, -1)))


def _unit_rows_and_tokens(tokens, query, center):
  """Rows (B, R, D) and tokens (B, M, D) of a map, of unit length."""
  tokens = tokens.astype(jnp.float32)
  query = tokens if query is None else query.astype(jnp.float32)
  if center:
    mean = tokens.mean(1, keepdims=True)  # (B, 1, D)
    tokens, query = tokens - mean, query - mean
  return _unit(query), _unit(tokens)


def _unit(x):
  """x / |x| along the last axis; a zero row stays zero."""
  return x * _inverse_length(jnp.sum(x * x, -1, keepdims=True))


def _inverse_length(squared):
  """1 / sqrt(squared), guarded."""
  return lax.rsqrt(jnp.maximum(squared, EPS))


def _pairwise(p, f, q, g):
  """A_i . S_i, |A_i|^2 and |S_i|^2, each (B, R), from the maps."""
  a, s = (
    jnp.einsum('brd,bmd->brm', rows, tokens, precision=HIGHEST)
    for rows, tokens in ((p, f), (q, g))
  )
  return jnp.sum(a * s, -1), jnp.sum(a * a, -1), jnp.sum(s * s, -1)


@jax.custom_vjp
def _linear(p, f, q, g):
  """The sums of `_pairwise` through Gram matrices; p and f are constants.

  Its own gradient because autodiff does not know that G'G is symmetric (12
  products instead of 10), and leaves three cotangents transposed, (D, M),
  that are alive at once: 403 MB instead of 353 for 16,384 bfloat16 tokens.
  """
  return _linear_forward(p, f, q, g)[0]


def _linear_forward(p, f, q, g):
  p_fg, p_ff, q_gg = (
    _times(p, _gram(f, g)),
    _times(p, _gram(f, f)),
    _times(q, _gram(g, g)),
  )
  products = (p_fg * q).sum(-1), (p_ff * p).sum(-1), (q_gg * q).sum(-1)
  return products, (p, f, q, g, p_fg, q_gg)


def _linear_backward(residuals, cotangents):
  p, f, q, g, p_fg, q_gg = residuals
  d_dot, _, d_ss = (c[..., None] for c in cotangents)  # (B, R, 1)
  d_q = d_dot * p_fg + 2 * d_ss * q_gg
  d_g = _times(f, _gram(p, d_dot * q)) + _times(g, _gram(q, 2 * d_ss * q))
  return None, None, d_q, d_g


_linear.defvjp(_linear_forward, _linear_backward)


def _gram(x, y):
  """X'Y of each image: (B, M, D), (B, M, E) -> (B, D, E)."""
  return jnp.einsum('bmd,bme->bde', x, y, precision=HIGHEST)


def _times(x, matrix):
  """(B, M, D), (B, D, E) -> (B, M, E)."""
  return jnp.einsum('bmd,bde->bme', x, matrix, precision=HIGHEST)


def _choose_form(form, p, f, q):
  """Resolves 'auto' by the shapes; see PAIRWISE_LIMIT."""
  if form not in ('auto', 'pairwise', 'linear'):
    raise ValueError(
      f"form is {form!r}, expected 'auto', 'pairwise' or 'linear'"
    )
  if form != 'auto':
    return form
  rows, tokens = p.shape[1], f.shape[1]
  mean_width = (p.shape[2] + q.shape[2]) / 2
  limit = PAIRWISE_LIMIT * mean_width * (rows + tokens)
  return 'pairwise' if rows * tokens <= limit else 'linear'


def _not_negative(value):
  """Cuts rounding below 0 off the value and leaves the gradient alone."""
  return value + lax.stop_gradient(jnp.maximum(value, 0) - value)


def _check_matching(teacher, student, teacher_query, student_query):
  """Sets and queries of the two networks must correspond."""
  if teacher.shape[:2] != student.shape[:2]:
    raise ValueError(
      f'teacher features are {teacher.shape} and student features '
      f'{student.shape}: images and tokens must agree; change the patch or '
      'image size of either network'
    )
  if (teacher_query is None) != (student_query is None):
    raise ValueError('give teacher_query and student_query, or neither')
  if (
    teacher_query is not None
    and teacher_query.shape[:2] != student_query.shape[:2]
  ):
    raise ValueError(
      f'teacher queries are {teacher_query.shape} and student queries '
      f'{student_query.shape}: images and rows must agree'
    )


def _check_same_shape(name, x, other_name, other):
  """Losses never broadcast: a forgotten linear layer would go unseen."""
  if x.shape != other.shape:
    raise ValueError(
      f'{name} is {x.shape} and {other_name} {other.shape}: they must have '
      "the same shape; project the student's to the teacher's width first"
    )
