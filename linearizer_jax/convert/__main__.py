"""Weights in and out, from the command line.

python -m linearizer_jax.convert export --checkpoint=WORKDIR --out=DIR
python -m linearizer_jax.convert export --checkpoint=runs/imagenette_cpu \
  --stage=finetune_both_s0 --out=linearizer_jax/weights/adventurer_imagenette
python -m linearizer_jax.convert import --folder=DIR --out=WORKDIR
python -m linearizer_jax.convert check --teacher=openai/clip-vit-base-patch16
"""

import argparse
import logging
import pathlib
import sys

import jax


def main(argv=None):
  parser = argparse.ArgumentParser(
    prog='python -m linearizer_jax.convert', description=__doc__.split('\n')[0]
  )
  commands = parser.add_subparsers(dest='command', required=True)

  out = commands.add_parser('export', help='a student as a PyTorch folder')
  out.add_argument(
    '--checkpoint',
    required=True,
    help='work directory of a run, or other weights of an Adventurer',
  )
  out.add_argument('--out', required=True, help='new folder')
  out.add_argument('--stage', help='of the run; the last finished one')
  out.add_argument('--step', type=int, help='saved step; the best or newest')
  out.add_argument(
    '--format',
    choices=('pytorch', 'onnx'),
    default='pytorch',
    help='onnx: model.onnx too',
  )

  back = commands.add_parser('import', help='an exported folder as a run')
  back.add_argument('--folder', required=True, help='from export')
  back.add_argument('--out', required=True, help='new work directory')

  check = commands.add_parser(
    'check', help='published weights of a teacher against transformers'
  )
  check.add_argument(
    '--teacher', required=True, help='name or hub id of a teacher, or a folder'
  )
  check.add_argument('--name', help='row of models/teachers.py of a folder')
  check.add_argument(
    '--steps', type=int, default=3, help='updates of a student to try'
  )

  text = commands.add_parser('text', help='class names for zero-shot')
  text.add_argument(
    '--teacher', required=True, help='hub id or folder of a CLIP'
  )
  text.add_argument('--classes', required=True, help='file, one name a line')
  text.add_argument('--prompts', help='file, one a line, {} for the name')
  text.add_argument('--out', required=True, help='.npz file')

  options = parser.parse_args(argv)
  # Comparisons to 1e-5: float32 products of an accelerator round more.
  jax.config.update('jax_platforms', 'cpu')
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  try:
    return COMMANDS[options.command](options)
  except (ValueError, OSError, ImportError) as error:
    return f'{parser.prog} {options.command}: {error}'


def _export(options):
  from linearizer_jax import checkpoint
  from linearizer_jax.convert.export import CONFIG, export

  differences = export(
    options.checkpoint,
    options.out,
    stage=options.stage,
    step=options.step,
    onnx=options.format == 'onnx',
  )
  for name, difference in differences.items():
    print(f'{name}: largest relative difference {difference:.1e}')
  run = checkpoint.read_json(pathlib.Path(options.out) / CONFIG)['run']
  of = f'Stage {run["stage"]}, step {run["step"]}: w' if run else 'W'
  print(f'{of}ritten to {options.out}.')


def _import(options):
  from linearizer_jax.convert.export import import_folder

  import_folder(options.folder, options.out)
  print(f'Written to {options.out}.')


def _check(options):
  from linearizer_jax.convert.check import check

  check(options.teacher, name=options.name, steps=options.steps)


def _text(options):
  from linearizer_jax.convert import text

  def lines(path):
    rows = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
    return [row.strip() for row in rows if row.strip()]

  prompts = lines(options.prompts) if options.prompts else text.PROMPTS
  text.embed_classes(
    options.teacher, lines(options.classes), options.out, prompts
  )
  print(f'Written to {options.out}.')


COMMANDS = {
  'export': _export,
  'import': _import,
  'check': _check,
  'text': _text,
}

if __name__ == '__main__':
  sys.exit(main())
