"""Times student and teacher over resolutions.

python -m linearizer_jax.benchmark --out=FILE.json
python -m linearizer_jax.benchmark --torch --out=FILE.json
python -m linearizer_jax.benchmark --distill=configs/distill_base.py
python -m linearizer_jax.benchmark --table=FILE.json
"""

import argparse
import json
import logging
import os
import pathlib
import shlex
import sys

DOCS = pathlib.Path('docs/benchmarks.md')
# platform -> what suits it
MODELS = {
  'cpu': (
    'adventurer_tiny_patch16',
    'vit_tiny_patch16',
    'adventurer_small_patch16',
    'vit_small_patch16',
  ),
  'accelerator': ('adventurer_base_patch16', 'vit_base_patch16'),
}
SIZES = {
  'cpu': '224,448,512,1024',
  'accelerator': '224,448,512,1024,1024x2048,2048',
  'torch': '224,1024',
}


def main(argv=None):
  argv = sys.argv[1:] if argv is None else argv
  parser = make_parser()
  options = parser.parse_args(argv)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('linearizer_jax').setLevel(logging.INFO)
  try:
    if options.table:
      return write_section(options.table, options.docs)
    how = measure_torch if options.torch else measure
    results = (measure_distillation if options.distill else how)(options)
  except (ValueError, ImportError, OSError) as error:
    return f'{parser.prog}: {error}'
  results['command'] = shlex.join([*parser.prog.split(), *argv])
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + '\n')
    if not options.distill:
      draw([options.out], options.out.with_suffix('.png'))
  print(section(results)[1])


def make_parser():
  parser = argparse.ArgumentParser(
    prog='python -m linearizer_jax.benchmark',
    description=__doc__.split('\n')[0],
  )
  parser.add_argument(
    '--models',
    type=lambda text: text.split(','),
    help='names with commas; the n-th student is compared with the n-th ViT',
  )
  parser.add_argument('--sizes', help='pixels: 224 or height x width, 512x1024')
  parser.add_argument('--out', type=pathlib.Path, help='a JSON file to write')
  parser.add_argument(
    '--seconds', type=float, default=420, help='for all of it (default 420)'
  )
  parser.add_argument('--tokens', type=int, help='patch tokens of a full batch')
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help='float32 on a CPU, else bfloat16',
  )
  parser.add_argument(
    '--max_gib', type=float, help='programs that need more are not run'
  )
  parser.add_argument(
    '--torch',
    action='store_true',
    help='the exported student against a ViT in PyTorch, on the CPU',
  )
  parser.add_argument(
    '--distill',
    metavar='CONFIG',
    help='the train step of this distillation with each scan of the device, '
    'such as configs/distill_base.py',
  )
  parser.add_argument(
    '--batch', type=int, help='with --distill: images a step (default 256)'
  )
  parser.add_argument(
    '--implementations',
    type=lambda text: text.split(','),
    help='with --distill: scans by name, with commas',
  )
  parser.add_argument(
    '--table',
    type=pathlib.Path,
    help='rewrite the section of the docs from this file; nothing is measured',
  )
  parser.add_argument('--docs', type=pathlib.Path, default=DOCS)
  return parser


def parse_sizes(text):
  """'224,512x1024' -> [(224, 224), (512, 1024)]."""
  sizes = []
  for part in text.split(','):
    sides = part.lower().split('x')
    if len(sides) > 2 or not all(s.isdigit() and int(s) for s in sides):
      raise ValueError(
        f'--sizes has {part!r}; expected pixels such as 224 or 512x1024.'
      )
    sizes.append((int(sides[0]), int(sides[-1])))
  return sizes


def refuse(options, *names, why):
  """Raises ValueError for options that were given and have no effect."""
  given = [f'--{name}' for name in names if getattr(options, name)]
  if given:
    raise ValueError(f'{", ".join(given)} would have no effect: {why}.')


def measure(options):
  """Results of the JAX models on the first device."""
  import jax

  from linearizer_jax.benchmark import run

  refuse(options, 'batch', 'implementations', why='they go with --distill')
  device = jax.devices()[0]
  kind = 'cpu' if device.platform == 'cpu' else 'accelerator'
  dtype = options.dtype or ('float32' if kind == 'cpu' else 'bfloat16')
  rows = run.run(
    options.models or MODELS[kind],
    parse_sizes(options.sizes or SIZES[kind]),
    device=device,
    dtype=dtype,
    seconds=options.seconds,
    tokens=options.tokens,
    max_gib=options.max_gib,
  )
  settings = {'dtype': dtype, 'seconds': options.seconds}
  return run.about(device, **settings) | {'rows': rows}


def measure_torch(options):
  """Results of the exported student and a plain ViT in PyTorch."""
  from linearizer_jax.benchmark import torch_cpu

  timed = f'one and {torch_cpu.BATCHES["full"]} images in float32'
  names = 'dtype', 'tokens', 'max_gib'
  refuse(options, *names, why=f'--torch times {timed}')
  refuse(options, 'batch', 'implementations', why='they go with --distill')
  return torch_cpu.run(
    options.models or MODELS['accelerator'],
    parse_sizes(options.sizes or SIZES['torch']),
    seconds=options.seconds,
  )


def measure_distillation(options):
  """Results of a distillation's train step on the first device."""
  # Other processes may run the steps, and must find the device's memory free.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax

  from linearizer_jax.benchmark import distill

  names = 'torch', 'models', 'sizes', 'tokens', 'dtype'
  refuse(options, *names, why='they do not go with --distill')
  device = jax.devices()[0]
  how = distill.run_apart if device.platform == 'gpu' else distill.run
  return how(
    options.distill,
    device=device,
    batch=options.batch or 256,
    implementations=options.implementations,
    seconds=options.seconds,
    max_gib=options.max_gib,
  )


def section(results):
  """(title, Markdown) of a file of results."""
  from linearizer_jax.benchmark import distill, summary

  if 'config' in results:
    return 'Distillation step', distill.markdown(results)
  return 'Student against teacher', summary.markdown(results)


def write_section(path, docs):
  """Puts the table of a file of results on its page."""
  from linearizer_jax.kernels import sections

  results = json.loads(path.read_text(encoding='utf-8'))
  what, text = section(results)
  title = f'{what}, {results["framework"]} on {results["platform"].upper()}'
  kind = 'distillation' if 'config' in results else 'benchmark'
  name = f'{kind} {results["framework"]} {results["platform"]}'
  sections.rewrite(docs, name, f'## {title}\n\n{text}')
  print(f'Section {name!r} of {docs} is written.')


def draw(files, path):
  """The picture beside the results, where matplotlib is installed."""
  from linearizer_jax import figures

  try:
    figures.tradeoff(files, path)
  except ImportError as error:
    print(f'No picture: {error}. Install the extra [demo].')
  except ValueError as error:  # nothing was timed
    print(f'No picture: {error}')


if __name__ == '__main__':
  sys.exit(main())
