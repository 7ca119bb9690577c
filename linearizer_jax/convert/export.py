"""Students to PyTorch and back.

An exported folder holds `model.safetensors` under the released names,
`config.json`, `modeling_adventurer.py`, which runs it on torch alone, and a
model card.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import shutil
import tempfile
import textwrap

import jax
import numpy as np
from safetensors.numpy import save_file

from linearizer_jax import checkpoint
from linearizer_jax.convert import FAMILIES, load, segmenter, tables
from linearizer_jax.models.adventurer import Adventurer, flip_schedule
from linearizer_jax.models.layers import as_pair
from linearizer_jax.models.segmenter import Segmenter

WEIGHTS, CONFIG, MODELING, CARD, ONNX = (
  'model.safetensors',
  'config.json',
  'modeling_adventurer.py',
  'README.md',
  'model.onnx',
)
MODEL_FIELDS = (
  'width',
  'depth',
  'patch_size',
  'image_size',
  'num_classes',
  'head_dim',
  'state_dim',
  'num_groups',
  'expand',
)
HEAD_FIELDS = (
  'num_classes',
  'head',
  'channels',
  'auxiliary_channels',
  'dropout',
)
# Largest relative difference, of float32 against float32. The same sums in
# another order give up to 3e-6 at 24 blocks.
TOLERANCE = {WEIGHTS: 1e-5, ONNX: 1e-4}
STAGE = 'imported'

_log = logging.getLogger('linearizer_jax')


def export(source, out, *, stage=None, step=None, onnx=False):
  """Writes a student as a folder that PyTorch reads, and compares the two.

  Args:
    source: a work directory, or anything else that `load` makes a student of.
    out: folder to write; must not hold anything. The folder of a student in
      `load.PACKAGED` gets its note on the card, and a limit.
    stage, step: of a work directory; the last finished stage and its best, else
      newest, checkpoint when None.
    onnx: also write `model.onnx`, for the model's own image size and batches of
      any size.

  Returns:
    {file: largest relative difference of its outputs from ours}.

  Raises:
    ValueError: `out` holds something, `source` is no student, the models
      differ, or it is too large for the package. Nothing is left behind.
    ImportError: torch, or what ONNX needs, is not installed.
  """
  with _whole_folder(out) as folder:
    exact = dict(dtype='float32', residual_dtype='float32')
    loaded = load.load(source, stage=stage, step=step, **exact)
    backbone = _backbone(loaded.model)
    if not isinstance(backbone, Adventurer):
      raise ValueError(
        f'{source} holds a {type(backbone).__name__}; only students are '
        'exported. Choose a stage that trained one with --stage.'
      )
    if onnx and backbone is not loaded.model:
      raise ValueError(
        f'{source} holds a segmenter, which is exported for PyTorch only: '
        'leave --format=onnx out.'
      )
    _write(folder, loaded, _provenance(source, stage, step))
    differences = {WEIGHTS: _compare_torch(folder, loaded)}
    if onnx:
      differences[ONNX] = _write_onnx(folder, loaded)
    if pathlib.Path(out).resolve().parent == load.WEIGHTS_FOLDER.resolve():
      _package(folder, pathlib.Path(out).name)
    for name, difference in differences.items():
      if not difference <= TOLERANCE[name]:  # a NaN too
        raise ValueError(
          f'{name} differs from the model by {difference:.1e} (relative), more '
          f'than {TOLERANCE[name]:.0e}. Nothing was written.'
        )
  return differences


def import_folder(folder, workdir):
  """An exported folder as a work directory, bit for bit.

  Args:
    folder: from `export`.
    workdir: a new folder; other runs can start from it (`config.init`).

  Raises:
    ValueError: `folder` is no export, or `workdir` holds something.
  """
  folder = pathlib.Path(folder)
  with _whole_folder(workdir) as partial:
    path = folder / CONFIG
    config = checkpoint.read_json(path) if path.is_file() else {}
    if not folder.is_dir():
      raise ValueError(f'there is no folder {folder}.')
    if not config.get('run'):
      raise ValueError(
        f'{folder} was not exported from a run: its {CONFIG} names none. Use '
        'the folder itself as config.init.'
      )
    run = config['run']['config'] | {'stages': [STAGE], 'per_stage': {}}
    loaded = load.load(folder)
    params = {'student': loaded.variables['params']}
    segments = isinstance(loaded.model, Segmenter)
    if segments:
      heads = dict(params['student'])
      params = {'student': heads.pop('backbone'), 'heads': heads}
    run |= {'task': 'segment' if segments else 'classify'}
    checkpoint.claim_workdir(partial, run | {'train_role': 'student'})
    checkpoint.save_params(
      checkpoint.stage_dir(partial, STAGE) / 'checkpoints',
      config['run']['step'],
      params,
      loaded.variables.get('batch_stats'),
    )


def _backbone(model):
  """The model under a segmentation head, or the model itself."""
  return model.backbone if isinstance(model, Segmenter) else model


@contextlib.contextmanager
def _whole_folder(out):
  """A new folder beside `out` that takes its name, or is removed on failure."""
  out = pathlib.Path(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f'{out} is there already: give another --out.')
  out.parent.mkdir(parents=True, exist_ok=True)
  partial = tempfile.mkdtemp(prefix=f'.{out.name}-', dir=out.parent)
  try:
    yield pathlib.Path(partial)
    os.chmod(partial, 0o755)  # mkdtemp makes it private
    os.replace(partial, out)  # an empty `out` is replaced
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _package(folder, name):
  """Adds a packaged student's note to its card; refuses one too large."""
  if name not in load.PACKAGED:
    raise ValueError(
      f'{name} is no student of the package; its names are '
      f'{", ".join(load.PACKAGED)} (PACKAGED in convert/load.py).'
    )
  size = sum(path.stat().st_size for path in folder.iterdir())
  if size > load.PACKAGED_BYTES:
    raise ValueError(
      f'{name} takes {size:,} bytes; the package takes up to '
      f'{load.PACKAGED_BYTES:,}: export a smaller student.'
    )
  with open(folder / CARD, 'a', encoding='utf-8') as card:
    card.write('\n' + textwrap.fill(load.PACKAGED[name], 79) + '\n')


def _provenance(source, stage, step):
  """The run behind a work directory: its config, and what it measured."""
  source = pathlib.Path(source).expanduser()  # as `load` reads it
  if not any(source.glob('*/checkpoints')):
    return {}
  info = checkpoint.describe(source, stage=stage, step=step)
  info['config']['data']['data_dir'] = None  # a place on one machine
  result = checkpoint.stage_dir(source, info['stage']) / 'result.json'
  result = checkpoint.read_json(result) if result.is_file() else {}
  return info | {'result': result}


def _write(folder, loaded, run):
  """Every file of an export but the ONNX one."""
  model, preprocess = _backbone(loaded.model), loaded.preprocess
  if model is loaded.model:
    (table,) = FAMILIES['adventurer']
    tensors = tables.to_state_dict(table, loaded.variables['params'])
  else:
    tensors = segmenter.to_tensors(loaded.variables)
  save_file(tensors, folder / WEIGHTS, metadata={'format': 'pt'})
  os.chmod(folder / WEIGHTS, 0o644)  # save_file makes it private
  fields = {field: getattr(model, field) for field in MODEL_FIELDS}
  flips = sorted(flip_schedule(model.flip_blocks, model.depth))
  if flips != sorted(flip_schedule('released', model.depth)):
    _log.warning(
      'blocks %s read the image backwards. The released Adventurer code would '
      'load these weights and flip blocks 2 and 3 instead: use %s.',
      *(flips, MODELING),
    )
  config = {
    'model_type': 'adventurer',
    'model': fields | {'flip_blocks': flips},
    'preprocessing': {
      'mean': preprocess.mean,
      'std': preprocess.std,
      'eval_crop': preprocess.eval_crop,
    },
    'run': run,
  }
  if model is not loaded.model:
    head = {field: getattr(loaded.model, field) for field in HEAD_FIELDS}
    config['segment'] = head
  checkpoint.write_json(folder / CONFIG, config)
  here = pathlib.Path(__file__).parent
  shutil.copyfile(here / 'torch_adventurer.py', folder / MODELING)
  (folder / CARD).write_text(_card(config, tensors), encoding='utf-8')


def _compare_torch(folder, loaded):
  """Largest relative difference over logits and maps, on random images."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      'an export is checked with torch: install the extra [torch].'
    ) from error
  other = _load_torch(folder)
  images = _images(loaded)
  with torch.no_grad():
    nchw = torch.from_numpy(np.transpose(images, (0, 3, 1, 2)).copy())
    theirs = {'forward': other(nchw)} | other.features(nchw)
  ours = _outputs(loaded, images)
  differences = [
    relative_difference(
      theirs[name].numpy().reshape(len(images), x.shape[-1], -1),
      np.moveaxis(x, -1, 1).reshape(len(images), x.shape[-1], -1),
    )
    for name, x in ours.items()
  ]
  return float(np.max(differences))  # unlike max, keeps a NaN


def _load_torch(folder):
  """The exported model, loaded as a user of the folder does."""
  spec = importlib.util.spec_from_file_location('modeling', folder / MODELING)
  modeling = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(modeling)
  return modeling.load(folder)


def _images(loaded):
  size = as_pair(loaded.model.image_size)
  random = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  return loaded.preprocess(random)


def _outputs(loaded, images):
  """{'forward': logits or class token, 'blockNN': (B, L, D)} of ours."""
  logits, out = jax.jit(loaded.model.apply)(loaded.variables, images)
  blocks = {f'block{n:02d}' for n in range(loaded.model.depth)}
  found = {name: np.asarray(out[name]) for name in blocks}
  forward = out['class'] if logits is None else logits
  return {'forward': np.asarray(forward)} | found


def relative_difference(x, reference):
  """max |x - reference| / max |reference|; NaN where either has one."""
  return float(np.abs(x - reference).max() / np.abs(reference).max())


def _write_onnx(folder, loaded):
  """Writes model.onnx, runs it on batches of two sizes: largest difference."""
  try:
    import onnxruntime
    import onnxscript  # noqa: F401 (torch needs it to export)
    import torch
  except ImportError as error:
    raise ImportError(
      f'--format=onnx needs {error.name}: install the extra [onnx].'
    ) from error
  images = _images(loaded)
  nchw = np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2)))
  torch.onnx.export(
    _load_torch(folder),
    (torch.from_numpy(nchw),),
    folder / ONNX,
    input_names=['images'],
    output_names=['output'],
    dynamic_shapes={'images': {0: torch.export.Dim('batch')}},
    dynamo=True,
    external_data=False,
    optimize=False,  # a third of the time, and the runtime does it anyway
    verbose=False,
  )
  session = onnxruntime.InferenceSession(
    folder / ONNX, providers=['CPUExecutionProvider']
  )
  ours = _outputs(loaded, images)['forward']
  differences = [
    relative_difference(session.run(None, {'images': nchw[:n]})[0], ours[:n])
    for n in (1, 2)
  ]
  return float(np.max(differences))


def _head_line(config):
  if 'segment' in config:
    head = config['segment']
    name = {'upernet': 'UperNet', 'linear': 'a linear layer'}[head['head']]
    return f'{name} gives each pixel one of {head["num_classes"]} classes.'
  classes = config['model']['num_classes']
  if classes:
    return f'{classes} classes.'
  return 'no head: it gives the class token.'


def _card(config, tensors):
  """The model card: what it is, what was measured, how to use it."""
  model, run = config['model'], config['run']
  count = sum(x.size for x in tensors.values())
  lines = [
    '# Adventurer, distilled with linearizer_jax' if run else '# Adventurer',
    '',
    f'A linear-time image model: {model["depth"]} Mamba-2 blocks of width '
    f'{model["width"]}, patches of {model["patch_size"]} pixels, '
    f'{count:,} parameters, ' + _head_line(config),
    '',
    f'- Images: {model["image_size"]} pixels, RGB, (x / 255 - mean) / std with '
    f'mean {list(config["preprocessing"]["mean"])} and std '
    f'{list(config["preprocessing"]["std"])}; other sizes work.',
    f'- Blocks that read the image backwards (`flip_blocks`): '
    f'{model["flip_blocks"]}. The released Adventurer code flips [2, 3].',
  ]
  if run:
    lines.append(
      f'- From stage `{run["stage"]}`, step {run["step"]}, data set '
      f'`{run["config"]["data"]["name"]}`.'
    )
  if run and run['result']:
    numbers = ', '.join(
      f'{name} {value:.4g}'
      for name, value in run['result'].items()
      if not name.startswith('iou_')
    )
    lines.append(f'- Measured at the end of that stage: {numbers}.')
  lines += [
    '',
    '```python',
    'import modeling_adventurer  # in this folder; needs torch, safetensors',
    '',
    "model = modeling_adventurer.load('.')",
    'output = model(images)  # (B, 3, H, W), normalised',
    'maps = model.features(images)  # {"block00": (B, D, H / p, W / p), ...}',
    '```',
    '',
    '`model.safetensors` holds the names and shapes of the released',
    'Adventurer, `config.json` the configuration of the run.',
  ]
  return '\n'.join(lines) + '\n'
