"""Rows, scales and stages of the tables in miniature, for imagenette.py."""

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
# Students that a segmentation starts from.
STARTS = {
  'random': {},
  'none': {},
  'both': {},
  'features_class': dict(distill=common.LOSSES['features']),
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
  }
  | {  # each loss on its own, at the ratio that did best
    f'masked_50_{row}': dict(
      distill=LOSSES[row]['distill'] | {'mask_ratio': 0.5}
    )
    for row in ('prediction', 'matching')
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
  'segmentation': STARTS,
  'segmentation_upernet': STARTS,
}
# Tables of segmentations, and the first word of their stages.
SEGMENTATIONS = {'segmentation': 'segment', 'segmentation_upernet': 'upernet'}
NO_FEW_LABELS = ('resolution', *SEGMENTATIONS)  # tables without these stages
TRAIN_IMAGES, CLASSES = 9469, 10
FEW_LABELS = TRAIN_IMAGES // CLASSES // 10  # of a class
# CamVid at a third of its size; the rest is configs/segment_folder.py.
SEGMENT_IMAGES = 367
SEGMENT = dict(
  task='segment',
  batch_size=8,
  eval_batch_size=4,
  optimizer=dict(learning_rate=1e-3, weight_decay=0.01, b2=0.999),
)
HEADS = {
  'segment': dict(head='linear'),
  'upernet': dict(channels=64, auxiliary_channels=64),
}
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


def with_baselines(table):
  """{row: changes} of a table with the two that stand in each."""
  rows = TABLES[table]
  return rows if 'both' in rows else {'none': {}, 'both': {}} | rows


def teachers(rows):
  """{stage: width, or MAE} of the teachers that only some rows have."""
  return {
    f'teacher_{row.split("_")[-1]}': changes['teacher']
    for row, changes in rows.items()
    if 'teacher' in changes
  }


def stages(table, rows, scale, seeds, segment_data):
  """{stage: fields} of every row and seed, with the teachers before them.

  Args:
    table: name of the table.
    rows: {row: changes} of those that are wanted.
    scale: one of `SCALES`.
    seeds: how many.
    segment_data: CamVid's folder, of the tables `SEGMENTATIONS`.
  """
  found = {'teacher': _teacher(scale, 1.0)}
  for name, width in teachers(rows).items():
    if width == MAE:
      found |= _without_labels(scale, name)
    else:
      found[name] = _teacher(scale, width)
  if 'teacher_double' in rows:
    found['teacher_double'] = _larger_teacher(scale, 2)
  for seed in range(seeds):  # outside: half a table is of use
    for row, changes in rows.items():
      if row not in ('random', 'teacher_double'):
        few_labels = table not in NO_FEW_LABELS
        found |= _student(scale, row, changes, seed, few_labels)
      if table in SEGMENTATIONS:
        kind = SEGMENTATIONS[table]
        found |= _segmentation(scale, kind, row, seed, segment_data)
  return found


def describe(scale):
  """(sentence about the scale, {table: sentence about it})."""
  setup = (
    'Imagenette at {image_size} px in patches of {patch_size}; teacher a ViT '
    'and student an Adventurer of width {width} and {depth} blocks, {dtype}; '
    'batches of {batch_size}. Updates: teacher {teacher_steps} with all '
    'labels; student {distill_steps} without labels, then {finetune_steps} '
    'with all or {few_steps} with 10 % of them; `none` as many in all, with '
    'labels.'
  )
  notes = {
    'teachers': (
      'Rows from `mae` have a teacher of {teacher_steps} updates without '
      'labels; `teacher mae` is that one after {finetune_steps} more with all.'
    ),
    'resolution': (
      'The rows called `double`: images of {side} px, matched in linear time; '
      '`teacher double` is the teacher evaluated there, with its positions '
      'resized. The teacher was trained on {image_size} px alone.'
    ),
  }
  heads = 'A linear layer', 'UperNet of 64 channels'
  for table, head in zip(SEGMENTATIONS, heads, strict=True):
    notes[table] = (
      f'{head} on the student after its fine-tuning, or on a random one, and '
      'both trained on CamVid: {segment_steps} updates of 8 crops of 96 x 128 '
      'from frames of 120 px on the short side, one recipe for all rows; 11 '
      'classes, the 233 test frames.'
    )
  scale = scale | {'side': 2 * scale['image_size']}
  texts = {table: note.format(**scale) for table, note in notes.items()}
  return setup.format(**scale), texts


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
    ((teacher, factor),) = (teachers({row: changes}) or {'teacher': 1}).items()
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


def _segmentation(scale, kind, row, seed, folder):
  """{stage: fields} of a row and seed: a class for every pixel."""
  steps = scale['segment_steps']
  fields = SEGMENT | dict(
    seed=seed,
    steps=steps,
    segment=HEADS[kind],
    init='' if row == 'random' else f'stage:finetune_{row}_s{seed}',
    student=dict(width=scale['width']),
    schedule=dict(warmup_epochs=_warmup(SEGMENT, steps, SEGMENT_IMAGES)),
    data=SEGMENT_DATA | dict(data_dir=folder),
  )
  return {f'{kind}_{row}_s{seed}': fields}


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
