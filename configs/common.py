"""What every config starts from, and how it is shrunk to a smoke run."""

import ml_collections
from ml_collections import config_dict

# None of the paper's losses, and a whole image for the student.
WHOLE = dict(match_weight=0.0, mask_weight=0.0, mask_ratio=0.0)
# What a student learns by, `losses=NAME` after the colon of --config: the
# paper's matching and masked prediction, or the features of every token and the
# class token, which won in miniature (docs/results.md, table `recipes`).
LOSSES = {
  'paper': {},
  'features': WHOLE | dict(feature_weight=1.0, class_weight=1.0),
}


def parse(argument, **defaults):
  """Reads 'epochs=100,smoke' into a ConfigDict with the types of `defaults`.

  A name alone is True. Unknown names are refused with the known ones.
  """
  values = ml_collections.ConfigDict(defaults | {'smoke': False})
  for item in filter(None, (argument or '').split(',')):
    name, _, value = item.partition('=')
    if name not in values:
      raise ValueError(
        f'unknown argument {name!r} after the colon of --config; expected '
        f'{", ".join(sorted(values.keys()))}.'
      )
    kind = type(values[name])
    try:
      values[name] = kind(value) if kind is not bool else value in ('', 'True')
    except ValueError as error:
      raise ValueError(
        f'{item} after the colon of --config: expected {name}={kind.__name__}.'
      ) from error
  return values


def losses(name):
  """Fields of `config.distill` for `losses=NAME`."""
  if name not in LOSSES:
    raise ValueError(
      f'losses={name} after the colon of --config; expected one of '
      f'{", ".join(LOSSES)}.'
    )
  return LOSSES[name]


def base():
  """Every field with its default; a config file sets what it needs."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  # 'classify', 'mae', 'evaluate', 'zeroshot', 'segment', 'evaluate_segment'
  config.task = 'distill'
  config.train_role = 'student'  # or 'teacher'; not of 'distill'
  # Start from 'stage:NAME', the work directory of a run or published weights;
  # a teacher's own name means those of the table of teachers.
  config.init = ''
  config.batch_size = 2048  # images in an update, over all devices
  config.eval_batch_size = 2048
  config.epochs = 300.0
  config.steps = 0  # updates, instead of epochs
  config.stages = ('distill',)  # names, in order
  config.per_stage = {}  # name -> the fields that differ there

  config.student = network('adventurer_base_patch16')
  config.teacher = network('clip_base_patch16')
  # 'stage:NAME', a work directory, a file, a folder, a hub id, 'random'; '' is
  # the source in the table of teachers.
  config.teacher.weights = ''

  config.distill = distill()
  config.classify = ml_collections.ConfigDict(
    dict(
      label_smoothing=0.0,
      mixup=0.0,
      cutmix=0.0,
      text_embeddings='',  # of 'zeroshot', see linearizer_jax/zeroshot.py
    )
  )
  config.segment = ml_collections.ConfigDict(
    dict(
      head='upernet',  # 'linear'
      channels=512,
      auxiliary_channels=256,
      auxiliary_weight=0.4,
      dropout=0.1,
    )
  )
  config.mae = ml_collections.ConfigDict(
    dict(
      mask_ratio=0.75,
      decoder_width=512,
      decoder_depth=8,
      decoder_num_heads=16,
      norm_pixels=True,  # each patch by its own mean and deviation
    )
  )
  config.evaluate = ml_collections.ConfigDict(
    dict(
      metrics=('top1',),  # 'knn', 'linear': of features, without a head
      knn_neighbours=20,  # k
      knn_temperature=0.07,
      linear_l2=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # the best is taken
    )
  )
  config.data = data()
  config.optimizer = ml_collections.ConfigDict(
    dict(
      learning_rate=1.5e-3,
      b1=0.9,
      b2=0.98,
      eps=1e-8,
      weight_decay=0.05,
      clip_norm=3.0,  # 0: no clipping
      layer_decay=1.0,
      ema_decay=0.0,  # 0: no average is kept
      # Updates with a non-finite loss or gradient that are left out before the
      # run stops; 0: stop at the first.
      max_nonfinite_steps=0,
    )
  )
  config.schedule = ml_collections.ConfigDict(
    dict(warmup_epochs=10.0, final_lr=1e-5)
  )
  config.parallel = ml_collections.ConfigDict(dict(fsdp=1, accumulate_steps=1))
  config.checkpoint = ml_collections.ConfigDict(
    dict(every_steps=1000, keep_last=2, best_metric='', best_mode='max')
  )
  config.log = ml_collections.ConfigDict(
    dict(
      every_steps=50,
      eval_every_epochs=10.0,  # 0: at the end only
      images_every_epochs=0.0,  # activation maps for TensorBoard; 0: none
      profile_steps=(0, 0),  # (first, how many) for a profiler trace
    )
  )
  # Rows of the table at the end, (name, stages), of which the best counts, and
  # networks of the picture of activation maps, (name, stage).
  config.report = ml_collections.ConfigDict(
    dict(metric='', rows=(), nearest_neighbour='', maps=())
  )
  # Tables whose rows are runs, see linearizer_jax/results.py: (name, rows), the
  # name of the scale and a sentence about it.
  config.report.tables = ()
  config.report.scale = config.report.setup = ''
  # Of single tables: the first word of the stages, where they are segmentations
  # and the number is mIoU; a sentence.
  config.report.segmentations, config.report.notes = {}, {}
  return config.lock()


def network(name):
  """A model by name; fields that stay None are those of the name."""
  number = config_dict.placeholder
  return ml_collections.ConfigDict(
    dict(
      name=name,
      dtype='bfloat16',
      mean=number(tuple),  # per RGB channel of its images, where white is 1;
      std=number(tuple),  # ImageNet's, or those of published weights
      drop_path=0.0,
      image_size=number(int),  # that the positions are made for
      patch_size=number(int),
      width=number(int),
      depth=number(int),
      num_heads=number(int),  # ViT, as class_token
      class_token=number(bool),
      head_dim=number(int),  # Adventurer, from here on
      state_dim=number(int),
      flip_blocks=number(object),
      heading_tokens=number(str),
      chunk_size=number(int),
      remat=number(str),
      residual_dtype=number(str),
      ssd_implementation=number(str),
    )
  )


def distill():
  """Losses of a distillation (docs of `tasks.distill.Distill`)."""
  return ml_collections.ConfigDict(
    dict(
      mask_ratio=0.75,
      num_stages=4,  # K
      match_weight=1.0,
      match_tokens='visible',  # 'all', 'class'
      match_class=False,
      map_center=False,
      form='auto',  # 'pairwise', 'linear': the same value
      mask_weight=1.0,  # lambda
      mask_loss='smooth_l1',  # 'cosine', 'mse'
      target='raw',  # 'normed', 'projected'
      target_norm='layernorm',  # 'none'
      feature_weight=0.0,
      feature_stages='last',  # 'all'
      logit_weight=0.0,
      logit_temperature=1.0,
      class_weight=0.0,  # class token, of the masked image
    )
  )


def data():
  """ImageNet with the paper's augmentation (`data.config.DataConfig`)."""
  optional = config_dict.placeholder

  def pair(size):  # an int or a tuple of two
    return config_dict.FieldReference(size, field_type=object)

  return ml_collections.ConfigDict(
    dict(
      name='imagenet2012',
      data_dir=optional(str),
      train_split=optional(str),
      eval_split=optional(str),
      image_size=pair(224),  # side, or (height, width)
      num_classes=optional(int),  # needed by a dense 'folder' alone
      num_examples=256,
      cache_pixels=0,
      labels_per_class=optional(int),
      labels_seed=0,
      crop_scale=(0.2, 1.0),
      crop_ratio=(3 / 4, 4 / 3),
      flip=True,
      shift_pixels=0,
      rotate_degrees=0.0,
      three_augment=False,  # DeiT III's, with color_jitter=0.3
      color_jitter=0.0,
      randaugment_ops=0,
      randaugment_magnitude=9.0,
      randaugment_std=0.5,
      shuffle=True,
      eval_crop=0.875,
      dense=False,  # a label for each pixel, and fields that only then count
      ignore_labels=(255,),
      short_side=0,
      scale_range=(0.5, 2.0),
      category_max_ratio=0.75,
      eval_window=pair(0),  # side or (height, width); 0: the whole image
      eval_stride=pair(0),
      decoder='pillow',  # or 'simd', of the extra [simd]
      max_broken=0,  # images that cannot be decoded, before a run stops
      timeout_seconds=600.0,  # without a batch, before a run stops; 0: never
      num_workers=8,
      num_threads=1,
    )
  )


def smoke(config):
  """Shrinks any config to seconds: generated images, random teacher, tiny."""
  config.unlock()
  config.data.name = 'generated'
  config.data.num_examples = 32
  patch = 8
  config.data.image_size = 4 * patch
  config.data.num_workers = 0
  config.data.labels_per_class = None
  config.data.data_dir = None
  config.data.train_split = config.data.eval_split = None
  config.batch_size = config.eval_batch_size = 8
  config.steps = 3
  config.schedule.warmup_epochs = 0.0
  config.log.every_steps = 1
  config.log.eval_every_epochs = 0.0
  config.checkpoint.every_steps = 2
  for role in ('student', 'teacher'):
    section = config[role]
    section.width, section.depth, section.patch_size = 64, 2, patch
    section.image_size = 4 * patch
  config.distill.num_stages = 2
  config.mae.decoder_width, config.mae.decoder_depth = 32, 1
  config.mae.decoder_num_heads = 4
  dense = [
    section
    for section in (config, *config.per_stage.values())
    if section.get('data', {}).get('dense')
  ]
  for section in dense:
    section.data.update(num_classes=3, image_size=(4 * patch, 4 * patch))
    section.data.update(short_side=0, eval_window=0, eval_stride=0)
    section.segment.update(channels=16, auxiliary_channels=16)
    for role in ('student', 'teacher'):
      config[role].depth = 4  # UperNet reads four blocks
  config.student.head_dim = config.student.state_dim = 16
  config.teacher.num_heads = 4
  if 'teacher' not in config.stages:
    config.teacher.weights = 'random'
  if not config.init.startswith('stage:'):
    config.init = ''
  for changes in config.per_stage.values():
    for field in (
      *('steps', 'epochs', 'batch_size', 'eval_batch_size'),
      *('schedule', 'log'),
    ):
      if field in changes:
        del changes[field]
    if 'labels_per_class' in changes.get('data', {}):
      changes.data.labels_per_class = 1
  return config.lock()
