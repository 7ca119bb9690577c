"""Named shapes, shared by the tests and `kernels/bench.py`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of one call of `ssd`; letters as in api.py."""

  batch: int
  length: int
  heads: int
  head_dim: int = 64
  state_dim: int = 64
  groups: int = 1


# An image of S pixels in patches of p has (S / p)^2 + 2 tokens in the scan;
# heads are width / 32. Batches are per chip.
SHAPES = {
  # Training at 224 px, patch 16, by size of the student.
  'tiny_224': Shape(batch=128, length=198, heads=8),
  'small_224': Shape(batch=128, length=198, heads=16),
  'base_224': Shape(batch=128, length=198, heads=24),
  'large_224': Shape(batch=64, length=198, heads=32),
  # Larger images, down to one image of 2048 x 2048.
  'base_384': Shape(batch=32, length=578, heads=24),
  'base_448': Shape(batch=32, length=786, heads=24),
  'base_448_p8': Shape(batch=8, length=3138, heads=24),
  'base_512': Shape(batch=8, length=1026, heads=24),
  'base_2048': Shape(batch=1, length=16386, heads=24),
  # A round length, for counting.
  'base_1024_tokens': Shape(batch=8, length=1024, heads=24),
  # What a laptop is measured on.
  'cpu_198': Shape(batch=4, length=198, heads=24),
  'cpu_786': Shape(batch=4, length=786, heads=24),
  'cpu_2048': Shape(batch=4, length=2048, heads=24),
  'cpu_3138': Shape(batch=4, length=3138, heads=24),
  'cpu_8192': Shape(batch=4, length=8192, heads=24),
}
