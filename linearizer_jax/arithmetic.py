"""Arithmetic of a traced program.

XLA's cost analysis counts the body of a loop once: of a step in four
micro-batches it sees a quarter, and of products that XLA itself splits into
loops over shards a part. The trace has every loop's length.
"""

import math

import jax
from jax.extend import core


def count(jaxpr):
  """FLOPs of a program's products, two for a multiplication with addition.

  Matrix products, convolutions and Pallas kernels, these by their cost
  estimate or, without one, by the products in them; all else is left out.
  What is computed again in the backward pass counts again. A loop whose length
  is not in the trace (`while_loop`) counts once, a conditional by its most
  expensive branch.

  Args:
    jaxpr: `jitted.trace(*args).jaxpr`; arrays with the shapes they have over
      all devices.

  Returns:
    int, of all devices together.
  """
  total = 0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    inner = [count(sub) for sub in _jaxprs(params)]
    if name in _PRODUCTS:
      total += _PRODUCTS[name](eqn)
    elif name == 'scan':
      total += params['length'] * sum(inner)
    elif name == 'cond':
      total += max(inner)
    elif name == 'shard_map':
      total += params['mesh'].size * sum(inner)
    elif name == 'pallas_call':
      estimate = params['cost_estimate']
      steps = math.prod(params['grid_mapping'].grid)
      total += estimate.flops if estimate else steps * sum(inner)
    else:
      total += sum(inner)
  return total


def _dot(eqn):
  lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
  (contracted, _), _ = eqn.params['dimension_numbers']
  return 2 * out.size * math.prod(lhs.shape[i] for i in contracted)


def _convolution(eqn):
  kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
  features = eqn.params['dimension_numbers'].rhs_spec[0]
  return 2 * out.size * kernel.size // kernel.shape[features]


_PRODUCTS = {'dot_general': _dot, 'conv_general_dilated': _convolution}


def _jaxprs(params):
  """The programs among an equation's parameters."""
  leaves = jax.tree.leaves(params, is_leaf=_is_program)
  return [getattr(leaf, 'jaxpr', leaf) for leaf in leaves if _is_program(leaf)]


def _is_program(leaf):
  return isinstance(leaf, (core.Jaxpr, core.ClosedJaxpr))
