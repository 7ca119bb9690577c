"""Adventurer in PyTorch: a linear-time image model, in one file.

    import modeling_adventurer
    model = modeling_adventurer.load('.')  # the folder with model.safetensors
    logits = model(images)                 # (B, 3, H, W) normalised
    maps = model.features(images)          # {'block11': (B, D, H/p, W/p), ...}

Logits are (B, V), those of a segmenter (B, V, H, W). Needs torch, and
safetensors to load; runs on any device without a compiler. On CUDA the scan is
that of mamba_ssm where it is installed. Every parameter has the name and shape
that the released Adventurer gives it.

Shape letters: B batch, V classes, L tokens, D width, H heads, P head dim, G
groups of R heads, N state, K chunks of Q tokens.
"""

import json
import math
import pathlib

import torch
from torch import nn
from torch.nn import functional as F

try:
  from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
  mamba_chunk_scan_combined = None

CHUNK = 66  # tokens; a third of those of 224 pixels, the fastest on a CPU
EPSILON = 1e-5
TINY = 1e-30  # dt may be 0 where its logarithm is taken


def load(folder='.', device='cpu'):
  """The exported model, in evaluation mode.

  Args:
    folder: holds config.json and model.safetensors.
    device: where the parameters go.

  Returns:
    `Adventurer`, or `Segmenter` where the config has a 'segment'; its `config`
    is what config.json says, with the mean and std of its input under
    'preprocessing'.

  Raises:
    FileNotFoundError: one of the files is missing.
    RuntimeError: the weights are not those of the config.
  """
  import safetensors.torch

  folder = pathlib.Path(folder)
  config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  if 'segment' in config:
    model = Segmenter(config['segment'], **config['model'])
  else:
    model = Adventurer(**config['model'])
  model.config = config
  tensors = safetensors.torch.load_file(folder / 'model.safetensors')
  model.load_state_dict(tensors)
  return model.to(device).eval()


class Adventurer(nn.Module):
  """Linear-time vision model of Mamba-2 blocks (arXiv 2410.07599).

  Args:
    width, depth, patch_size: of the model.
    image_size: pixels, int or (height, width), the positions are made for;
      other images get them resized.
    num_classes: 0 means no head: `forward` gives the class token instead.
    flip_blocks: numbers of the blocks that read the image backwards.
    **ssm: head_dim, state_dim, num_groups, expand of `Mamba2`.
  """

  def __init__(
    self, width, depth, patch_size, image_size, num_classes, flip_blocks, **ssm
  ):
    super().__init__()
    self.patch_size = patch_size
    pair = (image_size,) * 2 if isinstance(image_size, int) else image_size
    self.grid = tuple(side // patch_size for side in pair)
    tokens = self.grid[0] * self.grid[1]
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 1, width))
    self.patch_embed = nn.Module()
    self.patch_embed.proj = nn.Conv2d(3, width, patch_size, patch_size)
    self.layers = nn.ModuleList(
      Block(n in flip_blocks, width, **ssm) for n in range(depth)
    )
    self.norm_f = RMSNorm(width)
    self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

  def forward(self, images):
    """(B, 3, H, W) normalised -> logits (B, classes), or class token (B, D)."""
    return self.head(self.norm_f(self.tokens(images)[:, -1]))

  def tokens(self, images):
    """Patch tokens, then the class token, after the last block."""
    h = self.embed(images)
    for layer in self.layers:
      h = layer(h)
    return h

  def features(self, images, blocks=None):
    """Maps after the blocks: {'blockNN': (B, D, H / p, W / p)}.

    Args:
      images: (B, 3, H, W) normalised, sides multiples of the patch size.
      blocks: numbers counted from 0; all when None.
    """
    h, grid, found = self.embed(images), self.grid_of(images), {}
    for n, layer in enumerate(self.layers):
      h = layer(h)
      if blocks is None or n in blocks:
        found[f'block{n:02d}'] = h[:, :-1].mT.unflatten(-1, grid)
    return found

  def embed(self, images):
    """Patches in raster order, then the class token, with positions."""
    grid, positions = self.grid_of(images), self.pos_embed
    if grid != self.grid:
      own = positions[:, :-1].mT.unflatten(-1, self.grid).float()
      own = F.interpolate(own, grid, mode='bicubic', align_corners=False)
      own = own.flatten(2).mT.to(positions.dtype)
      positions = torch.cat([own, positions[:, -1:]], 1)
    patches = self.patch_embed.proj(images).flatten(2).mT  # (B, L, D)
    last = self.cls_token.expand(images.shape[0], -1, -1)
    return torch.cat([patches, last], 1) + positions

  def grid_of(self, images):
    """Rows and columns of patches."""
    (height, width), side = images.shape[-2:], self.patch_size
    if height % side or width % side:
      raise ValueError(
        f'{height} x {width} pixels: both must be multiples of {side}.'
      )
    return height // side, width // side


class Segmenter(Adventurer):
  """A class for every pixel: an Adventurer under UperNet or a linear layer.

  Args:
    segment: dict of num_classes, head ('upernet' or 'linear'), channels and
      auxiliary_channels of UperNet and of the head that helps to train it, and
      dropout.
    **fields: of `Adventurer`.
  """

  def __init__(self, segment, **fields):
    super().__init__(**fields)
    width, classes = fields['width'], segment['num_classes']
    dropout = segment['dropout']
    self.segment = nn.Module()
    self.blocks = [round(k * fields['depth'] / 4) - 1 for k in range(1, 5)]
    self.linear = segment['head'] == 'linear'
    if self.linear:
      self.segment.classifier = Classifier(width, classes, dropout)
      return
    self.segment.decoder = UperNet(
      width, classes, segment['channels'], dropout, fields['patch_size']
    )
    channels = segment['auxiliary_channels']
    self.segment.auxiliary_conv = ConvNorm(width, channels, 3)
    self.segment.auxiliary_classifier = Classifier(channels, classes, dropout)

  def forward(self, images, auxiliary=False):
    """(B, 3, H, W) normalised -> logits (B, classes, H, W).

    With `auxiliary`, a pair with those of the auxiliary head of UperNet.
    """
    size = images.shape[-2:]
    if self.linear:
      x = self.norm_f(self.tokens(images)[:, :-1])
      x = x.mT.unflatten(-1, self.grid_of(images))
      return resize(self.segment.classifier(x), size)
    maps = list(self.features(images, self.blocks).values())
    logits = resize(self.segment.decoder(maps), size)
    if not auxiliary:
      return logits
    x = self.segment.auxiliary_classifier(self.segment.auxiliary_conv(maps[2]))
    return logits, resize(x, size)


class UperNet(nn.Module):
  """Four maps (B, D, h, w) of one stride -> logits (arXiv 1807.10221)."""

  POOL_SCALES = (1, 2, 3, 6)

  def __init__(self, width, classes, channels, dropout, patch_size):
    super().__init__()
    doublings = round(math.log2(patch_size / 4))
    for k in range(4):
      setattr(self, f'rescale_{k}', Rescale(width, doublings - k))
    for n in range(len(self.POOL_SCALES)):
      setattr(self, f'pool_{n}', ConvNorm(width, channels, 1))
    for k in range(3):
      setattr(self, f'lateral_{k}', ConvNorm(width, channels, 1))
      setattr(self, f'fpn_{k}', ConvNorm(channels, channels, 3))
    pooled = width + len(self.POOL_SCALES) * channels
    self.bottleneck = ConvNorm(pooled, channels, 3)
    self.fuse = ConvNorm(4 * channels, channels, 3)
    self.classifier = Classifier(channels, classes, dropout)

  def forward(self, maps):
    maps = [getattr(self, f'rescale_{k}')(x) for k, x in enumerate(maps)]
    last = maps[-1]
    pooled = [last]
    for n, scale in enumerate(self.POOL_SCALES):
      x = getattr(self, f'pool_{n}')(F.adaptive_avg_pool2d(last, scale))
      pooled.append(resize(x, last.shape[-2:]))
    tops = [getattr(self, f'lateral_{k}')(maps[k]) for k in range(3)]
    tops.append(self.bottleneck(torch.cat(pooled, 1)))
    for k in (2, 1, 0):
      tops[k] = tops[k] + resize(tops[k + 1], tops[k].shape[-2:])
    for k in range(3):
      tops[k] = getattr(self, f'fpn_{k}')(tops[k])
    finest = tops[0].shape[-2:]
    x = self.fuse(torch.cat([resize(x, finest) for x in tops], 1))
    return self.classifier(x)


class Rescale(nn.Module):
  """Enlarges twofold `doublings` times, or halves as often by maxima."""

  def __init__(self, width, doublings):
    super().__init__()
    self.doublings = doublings
    for n in range(doublings):
      setattr(self, f'up_{n}', nn.ConvTranspose2d(width, width, 2, 2))
      if n:
        setattr(self, f'norm_{n}', nn.BatchNorm2d(width))

  def forward(self, x):
    if self.doublings < 0:
      side = 2**-self.doublings
      return F.max_pool2d(x, [min(side, s) for s in x.shape[-2:]])
    for n in range(self.doublings):
      if n:
        x = F.gelu(getattr(self, f'norm_{n}')(x))
      x = getattr(self, f'up_{n}')(x)
    return x


class ConvNorm(nn.Module):
  """Convolution without bias, batch norm, ReLU."""

  def __init__(self, width, channels, size):
    super().__init__()
    self.conv = nn.Conv2d(width, channels, size, padding=size // 2, bias=False)
    self.norm = nn.BatchNorm2d(channels)

  def forward(self, x):
    return F.relu(self.norm(self.conv(x)))


class Classifier(nn.Module):
  """Dropout of whole channels, then a 1 x 1 convolution."""

  def __init__(self, width, classes, dropout):
    super().__init__()
    self.dropout = nn.Dropout2d(dropout)
    self.conv = nn.Conv2d(width, classes, 1)

  def forward(self, x):
    return self.conv(self.dropout(x))


def resize(x, size):
  return F.interpolate(x, size, mode='bilinear', align_corners=False)


class Block(nn.Module):
  """h += mixer(norm(h)); h += mlp(norm_mlp(h)), the class token last."""

  def __init__(self, flip, width, **ssm):
    super().__init__()
    self.flip = flip
    self.norm = RMSNorm(width)
    self.mixer = Mamba2(width, **ssm)
    self.norm_mlp = RMSNorm(width)
    self.mlp = SwiGLU(width, int(2.5 * width))

  def forward(self, h):
    u = self.norm(h)
    mean = u.mean(1, keepdim=True)
    u = torch.cat([mean, self.reverse(u)], 1)
    h = h + self.reverse(self.mixer(u)[:, 1:])
    return h + self.mlp(self.norm_mlp(h))

  def reverse(self, u):
    """The patch tokens backwards, where the block flips."""
    if not self.flip:
      return u
    return torch.cat([u[:, :-1].flip(1), u[:, -1:]], 1)


class Mamba2(nn.Module):
  """Causal token mixer, (B, L, D) -> (B, L, D) (arXiv 2405.21060)."""

  def __init__(self, width, head_dim=64, state_dim=64, num_groups=1, expand=2):
    super().__init__()
    inner = expand * width
    channels, heads = inner + 2 * num_groups * state_dim, inner // head_dim
    self.split = (inner, channels, heads)
    self.head_dim, self.num_groups = head_dim, num_groups
    self.in_proj = nn.Linear(width, sum(self.split), bias=False)
    self.conv1d = nn.Conv1d(channels, channels, 4, groups=channels, padding=3)
    self.dt_bias = nn.Parameter(torch.zeros(heads))
    self.A_log = nn.Parameter(torch.zeros(heads))
    self.D = nn.Parameter(torch.ones(heads))
    self.norm = RMSNorm(inner)
    self.out_proj = nn.Linear(inner, width, bias=False)

  def forward(self, u):
    inner, channels, heads = self.split
    state = (channels - inner) // 2
    gate, rest, step = self.in_proj.weight.split(self.split)
    xbc = F.silu(self.convolve(F.linear(u, rest)), inplace=True)
    x, b, c = xbc.split((inner, state, state), -1)
    y = ssd(
      x.unflatten(-1, (heads, self.head_dim)),
      F.softplus(F.linear(u, step).float() + self.dt_bias.float()),
      -self.A_log.float().exp(),
      b.unflatten(-1, (self.num_groups, -1)),
      c.unflatten(-1, (self.num_groups, -1)),
      self.D.float(),
    )
    # Made last: fresh memory is slow on a CPU, so little is kept.
    z = F.silu(F.linear(u, gate).float(), inplace=True)
    return self.out_proj(self.norm(z.mul_(y.flatten(2).float())).to(u.dtype))

  def convolve(self, x):
    """The causal depthwise convolution of (B, L, channels), left where it is.

    As a convolution of images with channels last, which conv1d does not have.
    """
    x = F.conv2d(
      x.mT[:, :, None],
      self.conv1d.weight[:, :, None],
      self.conv1d.bias,
      padding=(0, 3),
      groups=x.shape[-1],
    )
    return x[:, :, 0, :-3].mT


def ssd(x, dt, a, b, c, d):
  """The scan S_t = exp(dt a) S_{t-1} + dt x B', y = S C + d x, in chunks.

  Args:
    x: (B, L, H, P).
    dt: (B, L, H) float32, positive.
    a: (H,) float32, negative.
    b, c: (B, L, G, N), G dividing H.
    d: (H,).

  Returns:
    y (B, L, H, P) in x's dtype; decays and states are float32.
  """
  if mamba_chunk_scan_combined is not None and x.is_cuda:
    parts = (part.contiguous() for part in (x, dt, a, b, c))
    return mamba_chunk_scan_combined(*parts, chunk_size=256, D=d)
  (batch, length, heads, dim), dtype = x.shape, x.dtype
  groups, state_dim = b.shape[2:]
  each = heads // groups
  count = math.ceil(length / CHUNK)
  size = math.ceil(length / count)
  pad = count * size - length  # dt = 0 leaves the state alone

  def chunks(part, *shape):  # (B, L, ...) -> (B, *shape[:2], K, Q, ...)
    if pad:
      part = F.pad(part, (0, 0) * (part.ndim - 2) + (0, pad))
    part = part.reshape(batch, count, size, *shape)
    return part.movedim((1, 2), (3, 4))

  dt = chunks(dt, groups, each)  # (B, G, R, K, Q), H = G R
  x = chunks(x, groups, each, dim).float().contiguous()  # (B, G, R, K, Q, P)
  b = chunks(b, groups, 1, state_dim).float()  # (B, G, 1, K, Q, N)
  c = chunks(c, groups, 1, state_dim).float()
  # Powers of 2: on a CPU exp takes up to 30 times as long as exp2.
  rate = (a * math.log2(math.e)).reshape(groups, each, 1, 1)
  decay = (dt * rate).cumsum(-1)  # (B, G, R, K, Q)
  source = decay - dt.clamp_min(TINY).log2()  # its token counts dt times

  y = x * d.reshape(groups, each, 1, 1, 1)
  # 1. What the tokens of a chunk give each other. Decays are of differences,
  # never quotients; what lies ahead is masked before the exponential.
  pairs = decay[..., :, None] - source[..., None, :]  # (B, G, R, K, Q, Q)
  pairs = (c @ b.mT) * pairs.add_(ahead(pairs, 1)).exp2_()
  add_product(y, pairs, x)
  del pairs
  if count > 1:  # 4. What a chunk receives from before it.
    states = states_before(x, b, decay, source)
    add_product(y, c * decay.exp2()[..., None], states)
  y = y.permute(0, 3, 4, 1, 2, 5)  # (B, K, Q, G, R, P)
  return y.flatten(3, 4).flatten(1, 2)[:, :length].to(dtype)


def add_product(y, left, right):
  """y += left @ right, matrices in the last two axes of contiguous arrays."""
  left, right = left.flatten(0, -3).float(), right.flatten(0, -3).float()
  y.flatten(0, -3).baddbmm_(left, right)


def states_before(x, b, decay, source):  # (B, G, R, K, N, P)
  # 2. The state that each chunk adds by its end.
  ending = (decay[..., -1:] - source).exp2()
  added = (b * ending[..., None]).mT @ x
  # 3. Its sum over the chunks before, as a product: an exporter would unroll a
  # loop. Only what lies between two chunks is summed for their decay.
  ends = F.pad(decay[..., :-1, -1], (1, 0))  # of the chunk before
  ends = ends[..., None].expand(*ends.shape, x.shape[3])  # (B, G, R, K, K)
  carry = ends.tril(-2).cumsum(-2).add_(ahead(ends, 0)).exp2_()
  return (carry @ added.flatten(-2)).unflatten(-1, added.shape[-2:])


def ahead(x, diagonal):
  """-inf on and above a diagonal of (..., Q, Q), 0 below it: (Q, Q)."""
  size = x.shape[-1]
  return torch.full((size, size), -math.inf, device=x.device).triu(diagonal)


class SwiGLU(nn.Module):
  """w3(silu(w1 x) * (w2 x))."""

  def __init__(self, width, hidden):
    super().__init__()
    self.w1 = nn.Linear(width, hidden)
    self.w2 = nn.Linear(width, hidden)
    self.w3 = nn.Linear(hidden, width)

  def forward(self, x):
    return self.w3(F.silu(self.w1(x), inplace=True).mul_(self.w2(x)))


class RMSNorm(nn.Module):
  """x rsqrt(mean(x^2) + eps) weight, in float32, back to the weight's dtype."""

  def __init__(self, width):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(width))

  def forward(self, x):
    y = x.float()
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    y = y * torch.rsqrt(norm.square() / y.shape[-1] + EPSILON)
    return y.mul_(self.weight.float()).to(self.weight.dtype)
