"""Finds and reads weights that others published; runs nothing of a file.

safetensors is data. Files of torch go through `torch.load(weights_only=True)`,
TorchScript archives through `convert/torchscript.py`.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import re

import huggingface_hub
import safetensors
from huggingface_hub import errors as hub_errors

from linearizer_jax.convert import FAMILIES, tables
from linearizer_jax.convert.torchscript import is_torchscript, read_torchscript

# Names of a checkpoint in a folder or on the hub, best first.
WEIGHT_FILES = (
  'model.safetensors',
  'open_clip_model.safetensors',
  'pytorch_model.bin',
  'open_clip_pytorch_model.bin',
)
CONFIG_FILES = ('config.json', 'open_clip_config.json')
TORCH_SUFFIXES = ('.pt', '.pth', '.bin')

# Their name of an activation -> ours.
ACTIVATIONS = {
  'quick_gelu': 'quick_gelu',
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
}


def load_weights(source, family, shapes, *, archive=None, fields=None):
  """Published weights as parameters of one of our models.

  Args:
    source: see `find_weights`.
    family: a key of FAMILIES.
    shapes: parameter tree of the model, of anything with shape and dtype.
    archive: as in `models.teachers.Teacher`, for its checksum, or None.
    fields: of the model, as `published_fields` names them; weights that ask for
      other ones are refused. None: whatever they ask for.

  Returns:
    Nested dict of numpy arrays.

  Raises:
    FileNotFoundError: nothing there.
    ValueError: unreadable, or not the weights of this model; the text names
      what is missing, what is extra and what has another shape.
  """
  path = find_weights(source)
  check_archive_sha256(path, archive)
  published = published_fields(path) if fields else {}
  for name, value in published.items():
    if fields.get(name, value) != value:
      raise ValueError(
        f'the config beside {path} asks for {name} {value!r}, the model has '
        f'{fields[name]!r} and would compute something else. Set '
        'config.teacher.name to the row these weights are of or, where only '
        'the heads differ, config.teacher.num_heads.'
      )
  tensors = read_tensors(path)
  return tables.from_state_dict(FAMILIES[family], tensors, shapes, path)


def find_weights(source):
  """The file of weights behind a name.

  Args:
    source: a safetensors or torch file; a folder that holds one under its usual
      name; or 'owner/repository' of the Hugging Face hub, which is looked up
      in the local cache where there is no network.

  Returns:
    pathlib.Path of an existing file.

  Raises:
    FileNotFoundError: nothing there; says what to download and what to set.
    ValueError: a download that is not what the hub has.
  """
  path = pathlib.Path(source).expanduser()
  if path.is_file():
    return path
  if path.is_dir():
    for name in WEIGHT_FILES:
      if (path / name).is_file():
        return path / name
    raise FileNotFoundError(
      f'{path} holds no checkpoints of a run and none of '
      f'{", ".join(WEIGHT_FILES)}. Set config.teacher.weights or config.init '
      'to the file itself.'
    )
  is_hub_id = re.fullmatch(r'[\w.-]+/[\w.-]+', str(source))
  is_file_name = path.suffix in (*TORCH_SUFFIXES, '.safetensors')
  # Of a folder that is here, such as runs/, what is meant is a path.
  if not is_hub_id or is_file_name or path.parent.is_dir():
    raise FileNotFoundError(
      f'there is no weights file {path}. Expected a safetensors or torch file, '
      'a folder with one, a work directory with checkpoints or a repository of '
      'the Hugging Face hub: change config.teacher.weights or config.init.'
    )
  return download(str(source))


def download(repository):
  """The weights file of a hub repository, its config beside it in the cache.

  The hub's client resumes what was cut off; `check_hub_sha256` refuses what is
  damaged.
  """
  offline = None
  for name in WEIGHT_FILES:
    try:
      path = _hub_file(repository, name, offline)
    except hub_errors.LocalEntryNotFoundError as error:
      offline = error  # the other names may be in the cache
    except hub_errors.EntryNotFoundError:
      continue
    except hub_errors.RepositoryNotFoundError as error:
      raise FileNotFoundError(
        f'{repository} is neither a local path nor a repository of the Hugging '
        'Face hub. Correct config.teacher.weights.'
      ) from error
    else:
      check_hub_sha256(path)
      for config in CONFIG_FILES:
        with contextlib.suppress(hub_errors.EntryNotFoundError):
          _hub_file(repository, config, offline)
      return path
  if offline:
    raise FileNotFoundError(
      f'{repository} is neither a local path nor in the local cache, and the '
      'Hugging Face hub cannot be reached. Where there is network, download '
      f'https://huggingface.co/{repository}/resolve/main/{WEIGHT_FILES[0]} '
      '(pytorch_model.bin in some repositories) and set '
      'config.teacher.weights to that file.'
    ) from offline
  raise FileNotFoundError(
    f'{repository} on the Hugging Face hub holds none of '
    f'{", ".join(WEIGHT_FILES)}. Set config.teacher.weights to a local file.'
  )


def _hub_file(repository, name, offline):
  """One file of a repository; after a failed try from the cache alone."""
  return pathlib.Path(
    huggingface_hub.hf_hub_download(
      repository, name, local_files_only=offline is not None
    )
  )


def check_hub_sha256(path):
  """Refuses a cached file that differs from what the hub published.

  The cache names a large file after the SHA-256 that the hub gives for it.
  """
  published = path.resolve().name
  if re.fullmatch('[0-9a-f]{64}', published):
    _check_sha256(path, published)


def check_archive_sha256(path, archive):
  """Refuses a file that has an archive's name, but not its published sum."""
  if archive and path.name == archive.rpartition('/')[-1]:
    _check_sha256(path, archive.split('/')[-2])


def _check_sha256(path, published):
  with open(path, 'rb') as f:
    found = hashlib.file_digest(f, 'sha256').hexdigest()
  if found != published:
    raise ValueError(
      f'{path} is damaged: its SHA-256 is {found}, the published one is '
      f'{published}. Delete the file and download it again.'
    )


def published_fields(path):
  """Model fields that a config file beside the weights settles.

  The same tensors mean another network with another activation or number of
  heads, and positions do not say height and width, so these come with the
  weights.

  Args:
    path: the weights file.

  Returns:
    A dict with 'activation', 'num_heads' and 'image_size', as far as the file
    says.

  Raises:
    ValueError: an activation that ViT does not have.
  """
  for name in CONFIG_FILES:
    file = path.parent / name
    if not file.is_file():
      continue
    config = json.loads(file.read_text(encoding='utf-8'))
    if 'model_cfg' in config:  # OpenCLIP
      config = config['model_cfg']
      quick = config.get('quick_gelu', False)
      fields = {'activation': 'quick_gelu' if quick else 'gelu'}
      return fields | _size(config.get('vision_cfg', {}))
    config = config.get('vision_config', config)
    activation = config.get('hidden_act')
    if activation is None:
      continue
    if activation not in ACTIVATIONS:
      raise ValueError(
        f'{file} asks for activation {activation!r}; known are '
        f'{", ".join(ACTIVATIONS)}.'
      )
    fields = {'activation': ACTIVATIONS[activation]}
    if 'num_attention_heads' in config:
      fields['num_heads'] = config['num_attention_heads']
    return fields | _size(config)
  return {}


def _size(config):
  """The image size of a published config, as a field of the model."""
  size = config.get('image_size')
  if size is None:
    return {}
  return {'image_size': tuple(size) if isinstance(size, list) else size}


def read_tensors(path, ema=False):
  """{name: array} of a safetensors or torch file, which is never executed.

  Args:
    path: a file that ends in .safetensors, .pt, .pth or .bin. A torch file may
      hold the tensors themselves or a dict with 'state_dict' or 'model'.
    ema: take 'model_ema' of such a dict where there is one.

  Returns:
    Numpy arrays; from a torch file that is no TorchScript archive all float32.

  Raises:
    ValueError: another kind of file, a damaged one, or one with code in it.
    ImportError: a torch file that cannot be read without torch.
  """
  path = pathlib.Path(path)
  if path.suffix not in ('.safetensors', *TORCH_SUFFIXES):
    raise ValueError(
      f'{path} is no kind of weights file that is known here: .safetensors, '
      f'{", ".join(TORCH_SUFFIXES)}.'
    )
  try:
    if path.suffix == '.safetensors':
      return _read_safetensors(path)
    if is_torchscript(path):
      return read_torchscript(path)
    return _read_torch(path, ema)
  except (ImportError, OSError):
    raise
  # A parser trips over damaged bytes in any way there is.
  except Exception as error:
    cause = (str(error).splitlines() or [''])[0]
    raise ValueError(
      f'{path} is damaged, truncated, or holds more than tensors, which is '
      f'never executed here ({type(error).__name__}: {cause}). Download it '
      'again, or take the safetensors file of the same weights.'
    ) from error


def _read_safetensors(path):
  with safetensors.safe_open(path, framework='numpy') as f:
    return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def _read_torch(path, ema):
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f'{path} is a torch file: install the extra [torch], or convert the file '
      'to safetensors where torch is installed.'
    ) from error
  # Released Adventurers hold their training arguments as a Namespace.
  with torch.serialization.safe_globals([argparse.Namespace]):
    tensors = torch.load(path, map_location='cpu', weights_only=True)
  wrappers = ('model_ema',) * ema + ('state_dict', 'model')
  # Some save an average of None.
  tensors = next((tensors[w] for w in wrappers if tensors.get(w)), tensors)
  return {
    name.removeprefix('module.'): x.float().numpy()
    for name, x in tensors.items()
    if isinstance(x, torch.Tensor)
  }
