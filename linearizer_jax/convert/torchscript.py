"""Tensors of a TorchScript archive, OpenAI's form of CLIP, without torch.

`torch.load(weights_only=True)` refuses such archives, and `torch.jit.load`
compiles the code in them. An archive is a zip file: `data.pkl` holds a pickle
of the module tree, `data/N` the bytes of storage N. Here the opcodes of the
pickle are read as a description and nothing in it is imported, built or called.
"""

import math
import pickletools
import typing
import zipfile

import numpy as np

STORAGES = {
  'torch HalfStorage': np.float16,
  'torch FloatStorage': np.float32,
  'torch DoubleStorage': np.float64,
  'torch LongStorage': np.int64,
  'torch IntStorage': np.int32,
  'torch BoolStorage': np.bool_,
}
LITERALS = {
  'NONE': lambda: None,
  'NEWTRUE': lambda: True,
  'NEWFALSE': lambda: False,
  'EMPTY_TUPLE': tuple,
  'EMPTY_DICT': dict,
  'EMPTY_LIST': list,
}
ARGUMENTS = {
  *('BINUNICODE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT'),
  'GLOBAL',
}


class Call(typing.NamedTuple):
  """What the pickle asks to be called, which it is not."""

  function: str
  args: tuple


def is_torchscript(path):
  """Whether a file is a TorchScript archive."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(n.endswith('/constants.pkl') for n in archive.namelist())


def read_torchscript(path):
  """{name: array} of every parameter and buffer in a TorchScript archive.

  Args:
    path: the archive.

  Returns:
    Numpy arrays under the names of the module's state_dict.

  Raises:
    Exception: damaged, or not of the form that `torch.jit.save` writes.
  """
  with zipfile.ZipFile(path) as archive:
    [description] = [
      name
      for name in archive.namelist()
      if name.endswith('/data.pkl') and name.count('/') == 1
    ]
    tree = _parse(archive.read(description))
    folder = description.removesuffix('.pkl')
    return {name: _tensor(archive, folder, call) for name, call in _calls(tree)}


def _parse(pickled):
  """Pickle opcodes as plain data: objects are dicts, calls are `Call`s."""
  stack, marks, memo = [], [], {}

  def pop_marked():
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  for opcode, argument, _ in pickletools.genops(pickled):
    match opcode.name:
      case name if name in LITERALS:
        stack.append(LITERALS[name]())
      case name if name in ARGUMENTS:
        stack.append(argument)
      case 'MARK':
        marks.append(len(stack))
      case 'TUPLE':
        stack.append(tuple(pop_marked()))
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        size = int(opcode.name[-1])
        stack[-size:] = [tuple(stack[-size:])]
      case 'SETITEMS':
        items = pop_marked()
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
      case 'APPENDS':
        items = pop_marked()
        stack[-1].extend(items)
      case 'BINPUT' | 'LONG_BINPUT':
        memo[argument] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(memo[argument])
      case 'NEWOBJ':  # class and no arguments: an object, filled by BUILD
        del stack[-2:]
        stack.append({})
      case 'BUILD':
        state = stack.pop()
        stack[-1].update(state)
      case 'REDUCE':
        args = stack.pop()
        stack.append(Call(stack.pop(), args))
      case 'BINPERSID':
        stack.append(Call('storage', stack.pop()))
      case 'PROTO' | 'STOP':
        pass
      case name:
        raise ValueError(f'pickle opcode {name} has no place in weights')
  [tree] = stack
  return tree


def _calls(tree, prefix=''):
  """(name, Call) of every tensor below an object."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _calls(value, f'{prefix}{name}.')
    elif isinstance(value, Call) and value.function.startswith('torch._utils '):
      yield prefix + name, value


def _tensor(archive, folder, call):
  """The array that `_rebuild_tensor_v2` would make a tensor of."""
  if call.function != 'torch._utils _rebuild_tensor_v2':
    raise ValueError(f'a tensor made by {call.function}')
  storage, offset, shape, strides = call.args[:4]
  _, kind, number, _, _ = storage.args
  entry = archive.getinfo(f'{folder}/{int(number)}')
  if entry.compress_type != zipfile.ZIP_STORED:
    # torch never compresses tensors; a bomb does.
    raise ValueError(f'{entry.filename} is compressed')
  data = np.frombuffer(archive.read(entry), STORAGES[kind])
  last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  numbers = (offset, *shape, *strides)
  if min(numbers) < 0 or (math.prod(shape) and last >= len(data)):
    raise ValueError(f'{entry.filename} is smaller than its tensor')
  return np.lib.stride_tricks.as_strided(
    data[offset:],
    shape,
    [s * data.itemsize for s in strides],
    writeable=False,
  )
