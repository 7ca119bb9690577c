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

`table=segmentation,segment_data=CAMVID` trains UperNet on CamVid from the
fine-tuned students and, `random`, from nothing, with the same updates, and
scores the test split. CAMVID holds train/ and test/, each with images/ and
labels/ (docs/own_data.md): 367 and 233 frames of 480 x 360, ids 0 to 10, void
11. `table=resolution` has the student see images of twice the side, four times
the tokens, matched in linear time.

Scales: `scale=cpu` (default) takes four minutes a row and seed on one core, so
that the table `losses` is a matter of 100 minutes; `scale=gpu` is made for one
H200 and 20 minutes, and was not run by us.
"""

from configs import common

NARROW, WIDE = 0.5, 2.0  # of the width of the scale
MAE = 'mae'  # stage of a teacher that learns without labels
# table -> row -> what differs from the paper's method, which is `both`. A row
# called `none` is not distilled. Every table has `none` and `both`.
LOSSES = {
  'none': {},
  'logits': dict(distill=common.WHOLE | dict(logit_weight=1.0)),
  'features': dict(distill=common.WHOLE | dict(feature_weight=1.0)),
  'prediction': dict(distill=dict(match_weight=0.0)),
  'matching': dict(distill=dict(mask_weight=0.0)),
  'both': {},
  'both_features': dict(distill=dict(feature_weight=1.0)),
  'both_centred': dict(distill=dict(map_center=True)),
}
TABLES = {
  'losses': LOSSES,
  'recipes': {  # one pass of the student over the whole image, as `features`
    'features': LOSSES['features'],
    'features_class': dict(distill=common.LOSSES['features']),
    'features_class_matching': dict(
      distill=common.LOSSES['features'] | dict(match_weight=1.0)
    ),
    'both_class': dict(distill=dict(class_weight=1.0)),
  },
  'match_tokens': {
    'match_class': dict(distill=dict(match_tokens='class')),
    'match_all': dict(distill=dict(match_tokens='all')),
  },
  'flips': {
    'flips_alternate': dict(student=dict(flip_blocks='alternate')),
    'flips_never': dict(student=dict(flip_blocks=())),
  },
  'heading': {
    'heading_visible': dict(student=dict(heading_tokens='visible')),
  },
  'mask_ratio': {
    f'masked_{round(100 * ratio)}': dict(distill=dict(mask_ratio=ratio))
    for ratio in (0.25, 0.5, 0.9)
  },
  'stages': {
    f'stages_{count}': dict(distill=dict(num_stages=count)) for count in (1, 2)
  },
  'teachers': {
    'from_narrow': dict(teacher=NARROW),
    'from_wide': dict(teacher=WIDE),
    'from_mae': dict(teacher=MAE),
    'features_from_mae': dict(teacher=MAE, distill=common.LOSSES['features']),
  },
  'sizes': {
    f'{row}_{name}': dict(width=width)
    for name, width in (('narrow', NARROW), ('wide', WIDE))
    for row in ('none', 'both')
  },
  'resolution': {
    'teacher_double': dict(side=2),  # as it is, with positions resized
    'none_double': dict(side=2),
    'both_double': dict(side=2, distill=dict(form='linear')),
  },
  'segmentation': {
    'random': {},
    'none': {},
    'both': {},
    'features_class': dict(distill=common.LOSSES['features']),
  },
}
NO_FEW_LABELS = ('resolution', 'segmentation')  # tables without these stages
TRAIN_IMAGES, CLASSES = 9469, 10
FEW_LABELS = TRAIN_IMAGES // CLASSES // 10  # of a class
# CamVid at a third of its size; the rest is configs/segment_folder.py.
SEGMENT_IMAGES = 367
SEGMENT = dict(
  task='segment',
  batch_size=8,
  eval_batch_size=4,
  segment=dict(channels=64, auxiliary_channels=64),
  optimizer=dict(learning_rate=1e-3, weight_decay=0.01, b2=0.999),
)
SEGMENT_DATA = dict(
  dense=True,
  eval_split='test',
  num_classes=11,
  ignore_labels=(11, 255),
  image_size=(96, 128),
  short_side=120,
  scale_range=(0.8, 2.0),
  color_jitter=0.2,
  eval_crop=1.0,
)
SCALES = {
  'cpu': dict(
    image_size=32,
    patch_size=4,
    cache_pixels=48,
    width=64,
    depth=4,
    state_dim=16,
    dtype='float32',
    batch_size=16,
    eval_batch_size=64,
    teacher_steps=6000,
    distill_steps=1000,
    finetune_steps=500,
    few_steps=200,
    segment_steps=600,
    learning_rate=1.5e-3,
    finetune_rate=1e-3,
    classify=dict(label_smoothing=0.1),
    threads=2,
  ),
  'gpu': dict(
    image_size=128,
    patch_size=8,
    cache_pixels=128,
    width=256,
    depth=6,
    state_dim=64,
    dtype='bfloat16',
    batch_size=256,
    eval_batch_size=256,
    teacher_steps=2000,
    distill_steps=450,
    finetune_steps=250,
    few_steps=60,
    segment_steps=1200,
    learning_rate=1e-3,
    finetune_rate=5e-4,
    classify=dict(label_smoothing=0.1, mixup=0.2, cutmix=1.0),
    threads=16,
  ),
}


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
  for field, known in (('table', TABLES), ('scale', SCALES)):
    if options[field] not in known:
      raise ValueError(
        f'{field}={options[field]} after the colon of --config; expected one '
        f'of {", ".join(known)}.'
      )
  segmentation = options.table == 'segmentation'
  if segmentation and not options.segment_data and not options.smoke:
    raise ValueError(
      'table=segmentation after the colon of --config needs '
      'segment_data=FOLDER beside it: CamVid, with train/ and test/, each with '
      'images/ and labels/.'
    )
  scale = dict(SCALES[options.scale])
  for name in ('distill_steps', 'finetune_steps', 'few_steps'):
    scale[name] = round(options.length * scale[name])
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

  rows = {name: _rows(name) for name in TABLES}
  config.report.tables = tuple(
    (name, ('teacher', *_teachers(table), *table))
    for name, table in rows.items()
  )
  rows = rows[options.table]
  chosen = options.rows.split('+') if options.rows else list(rows)
  unknown = sorted(set(chosen) - set(rows))
  if unknown:
    raise ValueError(
      f'rows={options.rows} after the colon of --config: the table '
      f'{options.table} has no {", ".join(unknown)}; its rows are '
      f'{", ".join(rows)}.'
    )
  rows = {row: changes for row, changes in rows.items() if row in chosen}

  stages = {'teacher': _teacher(scale, 1.0)}
  for name, width in _teachers(rows).items():
    if width == MAE:
      stages |= _without_labels(scale, name)
    else:
      stages[name] = _teacher(scale, width)
  for seed in range(options.seeds):  # outside: half a table is of use
    for row, changes in rows.items():
      if row == 'teacher_double':
        stages[row] = _larger_teacher(scale, changes['side'])
        continue
      if row != 'random':
        few = options.table not in NO_FEW_LABELS
        stages |= _student(scale, row, changes, seed, few)
      if segmentation:
        stages |= _segmentation(scale, row, seed, options.segment_data)
  config.stages, config.per_stage = tuple(stages), stages
  config.report.scale = options.scale
  if options.length != 1:
    config.report.scale += f', students {options.length:g} times as long'
  config.report.setup = (
    'Imagenette at {image_size} px in patches of {patch_size}; teacher a ViT '
    'and student an Adventurer of width {width} and {depth} blocks, {dtype}; '
    'batches of {batch_size}. Updates: teacher {teacher_steps} with all '
    'labels; student {distill_steps} without labels, then {finetune_steps} '
    'with all or {few_steps} with 10 % of them; `none` as many in all, with '
    'labels.'
  ).format(**scale)
  config.report.metrics = {'segmentation': 'mIoU'}
  config.report.notes = {
    'teachers': (
      'Rows from `mae` have a teacher of {teacher_steps} updates without '
      'labels; `teacher mae` is that one after {finetune_steps} more with all.'
    ).format(**scale),
    'resolution': (
      'The rows called `double`: images of {side} px, matched in linear time; '
      '`teacher double` is the teacher evaluated there, with its positions '
      'resized. The teacher was trained on {image_size} px alone.'
    ).format(side=2 * scale['image_size'], **scale),
    'segmentation': (
      'CamVid, the 233 test frames, 11 classes: UperNet of 64 channels on the '
      'student after its fine-tuning, or on a random one; {segment_steps} '
      'updates of 8 crops of 96 x 128 from frames of 120 px on the short '
      'side, one recipe for all rows.'
    ).format(**scale),
  }
  return config


def _rows(table):
  """{row: changes} of a table with the two that stand in each."""
  rows = TABLES[table]
  return rows if 'both' in rows else {'none': {}, 'both': {}} | rows


def _teachers(rows):
  """{stage: width, or MAE} of the teachers that only some rows have."""
  return {
    f'teacher_{row.split("_")[-1]}': changes['teacher']
    for row, changes in rows.items()
    if 'teacher' in changes
  }


def _teacher(scale, width):
  """Fields of a stage: a ViT, `width` times as wide as the scale says."""
  return _supervised(scale, scale['teacher_steps']) | dict(
    train_role='teacher', teacher=dict(width=int(width * scale['width']))
  )


def _larger_teacher(scale, side):
  """Fields of a stage: the teacher, as it is, on images `side` times larger."""
  return _larger(scale, side) | dict(
    task='evaluate',
    train_role='teacher',
    init='stage:teacher',
    teacher=dict(width=scale['width']),
  )


def _larger(scale, side):
  """Fields of a stage whose images are `side` times as large; none for 1."""
  if side == 1:
    return {}
  sizes = {name: side * scale[name] for name in ('image_size', 'cache_pixels')}
  return dict(data=sizes)


def _without_labels(scale, tuned):
  """{stage: fields}: a masked autoencoder, and as `tuned` what labels add."""
  steps = scale['teacher_steps']
  warmup = _warmup(scale, steps, TRAIN_IMAGES)
  return {
    MAE: dict(
      task='mae',
      train_role='teacher',
      steps=steps,
      schedule=dict(warmup_epochs=warmup),
    ),
    tuned: _supervised(scale, scale['finetune_steps'])
    | dict(
      train_role='teacher',
      init=f'stage:{MAE}',
      optimizer=dict(learning_rate=scale['finetune_rate']),
    ),
  }


def _student(scale, row, changes, seed, few_labels):
  """{stage: fields} of a row and seed: without labels, with all, with few."""
  width = int(changes.get('width', 1) * scale['width'])
  own = dict(seed=seed, student=dict(width=width) | changes.get('student', {}))
  own |= _larger(scale, changes.get('side', 1))
  stages, before, start = {}, scale['distill_steps'], {}
  if row.split('_')[0] != 'none':
    ((teacher, factor),) = (_teachers({row: changes}) or {'teacher': 1}).items()
    if factor == MAE:
      teacher, factor = MAE, 1
    stages[f'distill_{row}_s{seed}'] = own | dict(
      steps=before,
      schedule=dict(warmup_epochs=_warmup(scale, before, TRAIN_IMAGES)),
      distill=changes.get('distill', {}),
      teacher=dict(
        width=int(factor * scale['width']), weights=f'stage:{teacher}'
      ),
    )
    start = dict(
      init=f'stage:distill_{row}_s{seed}',
      optimizer=dict(learning_rate=scale['finetune_rate']),
    )
    before = 0
  stages[f'finetune_{row}_s{seed}'] = (
    own | start | _supervised(scale, before + scale['finetune_steps'])
  )
  if not few_labels:
    return stages
  few = dict(data=dict(labels_per_class=FEW_LABELS, labels_seed=seed))
  stages[f'few_{row}_s{seed}'] = (
    own
    | start
    | few
    | _supervised(scale, before + scale['few_steps'], CLASSES * FEW_LABELS)
  )
  return stages


def _segmentation(scale, row, seed, folder):
  """{stage: fields} of a row and seed: a class for every pixel."""
  steps = scale['segment_steps']
  fields = SEGMENT | dict(
    seed=seed,
    steps=steps,
    init='' if row == 'random' else f'stage:finetune_{row}_s{seed}',
    student=dict(width=scale['width']),
    schedule=dict(warmup_epochs=_warmup(SEGMENT, steps, SEGMENT_IMAGES)),
    data=SEGMENT_DATA | dict(data_dir=folder),
  )
  return {f'segment_{row}_s{seed}': fields}


def _supervised(scale, steps, images=TRAIN_IMAGES):
  """Fields of a stage that learns from labels."""
  return dict(
    task='classify',
    steps=steps,
    schedule=dict(warmup_epochs=_warmup(scale, steps, images)),
    classify=scale['classify'],
  )


def _warmup(scale, steps, images):
  """A tenth of the updates, in epochs."""
  return steps / 10 * scale['batch_size'] / images
