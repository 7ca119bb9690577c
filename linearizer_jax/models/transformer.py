"""Layers of vision transformers: attention, MLP, block, attention pool.

Shape letters: B batch, T tokens, Q queries, D width.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from linearizer_jax.models.layers import DropPath


def quick_gelu(x):
  """x * sigmoid(1.702 x), OpenAI CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  'gelu': partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': partial(jax.nn.gelu, approximate=True),
  'quick_gelu': quick_gelu,
}

ATTENTIONS = (None, 'xla', 'cudnn')


def embedding_init(key, shape, dtype=jnp.float32):
  """Normal(1 / sqrt(width)), as CLIP's: with 0.02 a narrow ViT learns late."""
  return shape[-1] ** -0.5 * jax.random.normal(key, shape, dtype)


def LayerNorm(epsilon, dtype, **fields):  # noqa: N802 (made like a layer)
  """Layer norm whose statistics and affine map are float32 for any dtype.

  The two-pass variance: E[x^2] - E[x]^2 cancels in tokens with huge channels.
  """
  return nn.LayerNorm(epsilon, dtype=dtype, use_fast_variance=False, **fields)


def unfused_on_cpu(x):
  """x, and its gradient, behind a barrier to fusion on CPU.

  In front of a norm: XLA for CPU otherwise works out the gradients of all later
  norms anew in each block, a quarter of a small ViT's step. On TPU the barrier
  would cost 5 % of the traffic.
  """
  return jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )


class Attention(nn.Module):
  """Multi-head softmax attention, optionally from other queries.

  (B, T, D) -> (B, T, D), or (B, Q, D) for `queries` (B, Q, D). The columns of
  `in_proj` are [q, k, v], heads of D / num_heads channels in order. Softmax in
  float32.
  """

  num_heads: int
  implementation: str | None = None
  out_std: float | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, queries=None):
    width = x.shape[-1]
    std = width**-0.5
    in_proj = nn.Dense(
      3 * width,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(std),
      name='in_proj',
    )
    q, k, v = jnp.split(in_proj(x), 3, -1)
    if queries is not None:
      q = in_proj(queries)[..., :width]
    q, k, v = (
      y.reshape(*y.shape[:-1], self.num_heads, -1) for y in (q, k, v)
    )  # (B, T, heads, D / heads)
    y = jax.nn.dot_product_attention(
      q, k, v, implementation=self.implementation
    )
    y = y.reshape(*y.shape[:-2], width)  # (B, T, D)
    return nn.Dense(
      width,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(self.out_std or std),
      name='out_proj',
    )(y)


class MLP(nn.Module):
  """c_proj(activation(c_fc(x))): (B, T, D) -> (B, T, D)."""

  mlp_dim: int
  activation: str
  out_std: float | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    y = nn.Dense(
      self.mlp_dim,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal((2 * width) ** -0.5),
      name='c_fc',
    )(x)
    y = ACTIVATIONS[self.activation](y)
    return nn.Dense(
      width,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(self.out_std or width**-0.5),
      name='c_proj',
    )(y)


class Block(nn.Module):
  """Pre-norm transformer block: (B, T, D) -> (B, T, D) in x's dtype.

  x += drop_path(ls_1 * attn(ln_1(x)));  x += drop_path(ls_2 * mlp(ln_2(x)))
  """

  num_heads: int
  mlp_dim: int
  activation: str
  layer_norm_eps: float
  layer_scale: float | None
  drop_path: float
  attention_implementation: str | None
  out_std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    norm = partial(LayerNorm, self.layer_norm_eps, self.dtype)
    y = Attention(
      self.num_heads,
      self.attention_implementation,
      self.out_std,
      self.dtype,
      name='attn',
    )(norm(name='ln_1')(unfused_on_cpu(x)))
    x = x + DropPath(self.drop_path)(self.scaled(y, 'ls_1'), train)
    y = MLP(
      self.mlp_dim, self.activation, self.out_std, self.dtype, name='mlp'
    )(norm(name='ln_2')(unfused_on_cpu(x)))
    return x + DropPath(self.drop_path)(self.scaled(y, 'ls_2'), train)

  def scaled(self, y, name):
    """The branch times its learned channel scales, where the model has them."""
    if self.layer_scale is None:
      return y
    init = nn.initializers.constant(self.layer_scale)
    return y * self.param(name, init, (y.shape[-1],)).astype(self.dtype)


class AttentionPool(nn.Module):
  """SigLIP's pooling: one learned query attends to all tokens, then an MLP.

  y = attn(probe, x, x);  y + mlp(ln(y)):  (B, L, D) -> (B, D)
  """

  num_heads: int
  mlp_dim: int
  activation: str
  layer_norm_eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    probe = self.param('probe', embedding_init, (x.shape[-1],))
    probe = jnp.broadcast_to(
      probe.astype(self.dtype), (x.shape[0], 1, x.shape[-1])
    )
    y = Attention(self.num_heads, dtype=self.dtype, name='attn')(x, probe)
    y = y[:, 0]  # (B, D)
    z = LayerNorm(self.layer_norm_eps, self.dtype, name='ln')(y)
    return y + MLP(self.mlp_dim, self.activation, dtype=self.dtype, name='mlp')(
      z
    )
