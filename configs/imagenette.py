"""Small networks on ten classes of ImageNet, from a folder of JPEG files.

  python main.py --config=configs/imagenette.py --config.data.data_dir=FOLDER
  python main.py --config=configs/imagenette.py:table=losses
    --config.data.data_dir=FOLDER --workdir=runs/imagenette_cpu
  python -m linearizer_jax.results --runs=runs/imagenette_cpu
    --out=docs/results.md

FOLDER holds train/ and val/ with a folder of images per class, as Imagenette is
published. Trains a ViT teacher, distils an Adventurer from it without labels
and fine-tunes that, at 64 px in patches of 8.

`table=NAME` is one of the paper's tables in miniature, a row a student, three
seeds a row: distilled without labels, then fine-tuned on all labels and, from
the same start, on a tenth of them. The row `none` is the same student trained
with as many updates, all of them with labels. All tables of a scale share
teacher, `none` and `both` in one work directory; the command goes on where it
was stopped. `rows=none+both` picks rows, `seeds=1` the first seeds, `length=4`
makes the students' trainings four times as long, in `scale=cpu` as long as
their teacher's; it needs a work directory of its own. The teacher `mae` of the
table `teachers`, a masked autoencoder, learns without labels as well.

`table=segmentation,segment_data=CAMVID` trains the fine-tuned students and,
`random`, a new one on CamVid, with a linear layer on them, and scores the test
split; `segmentation_upernet` has UperNet instead. CAMVID holds train/ and
test/, each with images/ and labels/ (docs/own_data.md): 367 and 233 frames of
480 x 360, ids 0 to 10, void 11. `table=resolution` has the student see images
of twice the side, four times the tokens, matched in linear time.

Scales: `scale=cpu` (default) takes four minutes a row and seed on one core, so
that the table `losses` is a matter of 100 minutes; `scale=gpu` is made for one
H200 and 20 minutes, and was not run by us.
"""

from configs import common, tables


def get_config(argument=None):
  options = common.parse(
    argument,
    size=64,
    teacher_epochs=60.0,
    epochs=60.0,
    losses='features',
    table='',
    scale='cpu',
    seeds=3,
    rows='',
    length=1.0,
    segment_data='',
  )
  config = common.base()
  config.data.name = 'folder'
  config.data.crop_scale = (0.35, 1.0)
  config.student.name = 'adventurer_tiny_patch8'
  config.teacher.name = 'vit_tiny_patch8'
  config.teacher.weights = 'stage:teacher'
  config = (_table if options.table else _plain)(config, options)
  if options.smoke:
    return common.smoke(config)
  return config


def _plain(config, options):
  """Teacher, distillation and fine-tuning, one of each."""
  config.data.image_size = options.size
  config.data.num_workers = 2
  config.data.color_jitter = 0.2
  config.batch_size = 128
  config.eval_batch_size = 128
  config.epochs = options.epochs
  config.distill.update(common.losses(options.losses))
  config.optimizer.learning_rate = 1e-3
  shortest = min(options.epochs, options.teacher_epochs)
  config.schedule.warmup_epochs = min(5.0, shortest / 4)
  config.checkpoint.every_steps = 200

  for section in (config.student, config.teacher):
    section.dtype = 'float32'
    section.width, section.depth = 128, 6
  config.student.head_dim = 32
  config.student.state_dim = 32
  config.teacher.num_heads = 4

  supervised = dict(
    task='classify', classify=dict(label_smoothing=0.1, mixup=0.2, cutmix=1.0)
  )
  config.stages = ('teacher', 'distill', 'finetune')
  config.per_stage = {
    'teacher': supervised
    | dict(train_role='teacher', epochs=options.teacher_epochs),
    'finetune': supervised
    | dict(init='stage:distill', optimizer=dict(layer_decay=0.75)),
  }
  config.report.metric = 'accuracy'
  config.report.rows = (
    ('teacher', ('teacher',)),
    ('distilled', ('finetune',)),
  )
  return config


def _table(config, options):
  """Every row and seed of a table as stages of one run."""
  for field, known in (('table', tables.TABLES), ('scale', tables.SCALES)):
    if options[field] not in known:
      raise ValueError(
        f'{field}={options[field]} after the colon of --config; expected one '
        f'of {", ".join(known)}.'
      )
  if options.table in tables.SEGMENTATIONS and not (
    options.segment_data or options.smoke
  ):
    raise ValueError(
      f'table={options.table} after the colon of --config needs '
      'segment_data=FOLDER beside it: CamVid, with train/ and test/, each with '
      'images/ and labels/.'
    )
  scale = dict(tables.SCALES[options.scale])
  for name in ('distill_steps', 'finetune_steps', 'few_steps'):
    scale[name] = round(options.length * scale[name])
  _set_scale(config, scale)
  rows = {name: tables.with_baselines(name) for name in tables.TABLES}
  stages = tables.stages(
    options.table,
    _chosen(rows[options.table], options),
    scale,
    options.seeds,
    options.segment_data,
  )
  config.stages, config.per_stage = tuple(stages), stages
  config.report.tables = tuple(
    (name, ('teacher', *tables.teachers(table), *table))
    for name, table in rows.items()
  )
  config.report.scale = options.scale
  if options.length != 1:
    config.report.scale += f', students {options.length:g} times as long'
  config.report.setup, config.report.notes = tables.describe(scale)
  config.report.segmentations = tables.SEGMENTATIONS
  return config


def _set_scale(config, scale):
  """What the stages of a scale have in common."""
  config.data.image_size = scale['image_size']
  config.data.cache_pixels = scale['cache_pixels']
  # Threads, not processes: they share the images, and so do the stages.
  config.data.num_workers, config.data.num_threads = 0, scale['threads']
  config.batch_size = scale['batch_size']
  config.eval_batch_size = scale['eval_batch_size']
  config.optimizer.learning_rate = scale['learning_rate']
  config.optimizer.b2 = 0.95
  config.log.eval_every_epochs = 0.0
  config.checkpoint.every_steps = 200
  config.checkpoint.keep_last = 1
  for section in (config.student, config.teacher):
    section.dtype, section.depth = scale['dtype'], scale['depth']
    section.width, section.patch_size = scale['width'], scale['patch_size']
  config.student.head_dim = min(64, scale['width'])
  config.student.state_dim = scale['state_dim']
  config.teacher.num_heads = 4
  config.mae.decoder_width = scale['width'] // 2
  config.mae.decoder_depth, config.mae.decoder_num_heads = 2, 4


def _chosen(rows, options):
  """The rows that `rows=` after the colon names, all where it is empty."""
  names = options.rows.split('+') if options.rows else list(rows)
  unknown = sorted(set(names) - set(rows))
  if unknown:
    raise ValueError(
      f'rows={options.rows} after the colon of --config: the table '
      f'{options.table} has no {", ".join(unknown)}; its rows are '
      f'{", ".join(rows)}.'
    )
  return {row: changes for row, changes in rows.items() if row in names}
