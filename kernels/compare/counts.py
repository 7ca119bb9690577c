"""What is counted, not measured: bytes, FLOPs, calls in a sample."""

import numpy as np

DIRECTIONS = ('forward', 'forward+backward')
ATTENTION = 'attention'  # first word of the names of such programs
ATTENTION_DIM = 64  # of a head
CHUNK = 128  # tokens in a chunk of the scan, for its FLOPs
BACKWARD = 2  # a backward pass is two products for each one of the forward
SETS = 8  # of arguments, in a program that runs several times
WRONG = 0.1  # relative error from which on a program is not timed
MANY_BELOW_MS = 0.5
MANY_SECONDS = 40.0  # of compiling them at most: less than `run.PATIENCE`
SAMPLE_MS = 20.0
MOST_REPEATS = 200


def attention_heads(shape):
  """Heads of the attention of a ViT whose student has such a scan.

  The scan is as wide as H P = 2 D, attention as the model itself, D.
  """
  return max(1, shape.heads * shape.head_dim // 2 // ATTENTION_DIM)


def draw_attention(shape):
  """q, k, v and a cotangent, each (B, L, heads, 64) float32."""
  rng = np.random.default_rng(0)
  size = shape.batch, shape.length, attention_heads(shape), ATTENTION_DIM
  return [rng.standard_normal(size, np.float32) for _ in range(4)]


def repeats(milliseconds):
  """Calls that make a sample."""
  return int(np.clip(round(SAMPLE_MS / milliseconds), 1, MOST_REPEATS))


def settled(time_calls):
  """Milliseconds of a call: of one, to see how many to time, then of those."""
  return time_calls(repeats(time_calls(1)))


def bytes_moved(program, shape, direction, dtype):
  """Bytes of arguments and results, each once: what has to be moved.

  But for A and D, which are a number a head.
  """
  item = 2 if dtype == 'bfloat16' else 4
  tokens = shape.batch * shape.length
  if program.startswith(ATTENTION):
    each = tokens * attention_heads(shape) * ATTENTION_DIM * item
    return each * (4 if direction == 'forward' else 8)
  x = tokens * shape.heads * shape.head_dim * item
  dt = tokens * shape.heads * 4
  b_and_c = 2 * tokens * shape.groups * shape.state_dim * item
  arguments, results = x + dt + b_and_c, x
  if direction == 'forward':
    return arguments + results
  return 2 * arguments + 2 * results  # their cotangents as well


def flops(program, shape, direction):
  """FLOPs of the method, two for a multiplication with addition.

  Products alone. Of the scan those of its chunked form with Q = 128 (arXiv
  2405.21060, section 6): per token Q (N G + H P) inside a chunk and 2 N H P for
  the states. An implementation with other chunks does more or less.
  """
  tokens = shape.batch * shape.length
  if program.startswith(ATTENTION):
    width = attention_heads(shape) * ATTENTION_DIM
    products = 2 * shape.length * width
  else:
    inner = shape.heads * shape.head_dim
    chunk = min(CHUNK, shape.length)
    products = chunk * (shape.groups * shape.state_dim + inner)
    if shape.length > CHUNK:
      products += 2 * shape.state_dim * inner
  return 2 * tokens * products * (1 if direction == 'forward' else 1 + BACKWARD)


def derived(row, shape, dtype, peaks):
  """Rates of a row and their share of the device's, from its milliseconds.

  Args:
    row: with 'program', 'direction' and 'milliseconds', which may be None.
    shape, dtype: of the run.
    peaks: {'peak_flops', 'peak_bandwidth'}, each a number or None.

  Returns:
    'gb_per_second', 'bandwidth_share', 'tflop_per_second', 'flops_share'; None
    where they are not known.
  """
  names = 'gb_per_second', 'bandwidth_share', 'tflop_per_second', 'flops_share'
  if not row['milliseconds']:
    return dict.fromkeys(names)
  seconds = row['milliseconds'] / 1e3
  what = row['program'], shape, row['direction']
  moved, spent = bytes_moved(*what, dtype) / seconds, flops(*what) / seconds
  bandwidth, peak = peaks['peak_bandwidth'], peaks['peak_flops']
  if dtype != 'bfloat16':
    peak = None  # the published one is of bfloat16
  shares = bandwidth and moved / bandwidth, peak and spent / peak
  values = moved / 1e9, shares[0], spent / 1e12, shares[1]
  return dict(zip(names, values, strict=True))
