"""The embedded run: the whole method on real images, on a laptop.

  python main.py                      # this config is the default
  python main.py --config=configs/digits.py:losses

Trains a small ViT on scikit-learn's 1,797 handwritten digits, distils an
Adventurer from it without labels, fine-tunes that on 100 labels, and trains the
same student on the same 100 labels alone, with as many updates as the
fine-tuning, at three learning rates. Prints the table, draws the loss curves
and the activation maps. Minutes on two cores.
"""

from configs import common

# Rows of `:losses`: the distillation with the paper's losses, and another one.
LOSSES = {
  'matching': dict(mask_weight=0.0, mask_ratio=0.75, class_weight=0.0),
  'prediction': dict(match_weight=0.0, class_weight=0.0),
  'both': dict(class_weight=0.0),
  'features': common.WHOLE | dict(class_weight=0.0, feature_weight=1.0),
}
# Of the supervised student; the best of the three counts.
RATES = {'low': 1e-3, 'middle': 2e-3, 'high': 4e-3}
TEACHER_STEPS, DISTILL_STEPS, FEW_STEPS = 800, 600, 150


def get_config(argument=None):
  options = common.parse(argument, losses=False)
  config = common.base()
  config.data.name = 'digits'
  config.data.image_size = 16  # 64 tokens of 2 x 2 pixels
  config.data.crop_scale = None
  config.data.flip = False
  config.data.shift_pixels = 1
  config.data.rotate_degrees = 12.0
  config.data.eval_crop = 1.0
  config.data.num_workers = 0
  config.data.labels_seed = config.get_ref('seed')
  config.batch_size = 32
  config.eval_batch_size = 120
  config.log.every_steps = 20
  config.log.eval_every_epochs = 0.0
  config.checkpoint.every_steps = 200
  config.checkpoint.keep_last = 1
  config.optimizer.learning_rate = 2e-3
  config.optimizer.b2 = 0.95
  config.schedule.warmup_epochs = 1.0

  config.student.name = 'adventurer_tiny_patch16'
  config.teacher.name = 'vit_tiny_patch16'
  for section in (config.student, config.teacher):
    section.dtype = 'float32'
    section.width, section.depth, section.patch_size = 64, 4, 2
    # The digits' own: ImageNet's would put their black ground at -2.
    section.mean, section.std = (0.305,) * 3, (0.376,) * 3
  config.student.head_dim = 64
  config.student.state_dim = 16
  config.teacher.num_heads = 4
  config.teacher.weights = 'stage:teacher'
  # Half a digit still tells its class, which the class token is to learn too:
  # 100 labels are not enough to teach it that.
  config.distill.mask_ratio = 0.5
  config.distill.class_weight = 1.0

  labels = dict(labels_per_class=10)
  few = dict(
    task='classify',
    data=labels,
    batch_size=25,
    schedule=dict(warmup_epochs=5.0),
    log=dict(every_steps=20),
  )
  teacher = dict(
    task='classify',
    train_role='teacher',
    steps=TEACHER_STEPS,
    classify=dict(label_smoothing=0.1),
  )
  per_stage = {
    'teacher': teacher,
    'distill': dict(steps=DISTILL_STEPS),
    'finetune': few
    | dict(
      init='stage:distill',
      steps=FEW_STEPS,
      optimizer=dict(learning_rate=1e-3),
    ),
  }
  for name, rate in RATES.items():
    per_stage[f'supervised_{name}'] = few | dict(
      steps=FEW_STEPS,
      optimizer=dict(learning_rate=rate),
    )
  rows = {
    'teacher': ('teacher',),
    'supervised': tuple(s for s in per_stage if s.startswith('supervised_')),
    'distilled': ('finetune',),
  }
  if options.losses:
    for name, losses in LOSSES.items():
      per_stage[f'distill_{name}'] = per_stage['distill'] | dict(distill=losses)
      per_stage[f'finetune_{name}'] = per_stage['finetune'] | dict(
        init=f'stage:distill_{name}'
      )
      rows[name] = (f'finetune_{name}',)
  # What the run is for comes last: `load` and `export` take the last stage.
  config.stages = tuple(
    sorted(per_stage, key=lambda stage: stage in ('distill', 'finetune'))
  )
  config.per_stage = per_stage
  config.report.metric = 'accuracy'
  config.report.rows = tuple(rows.items())
  config.report.nearest_neighbour = 'finetune'  # on this stage's labels
  config.report.maps = (
    ('teacher', 'teacher'),
    ('supervised', 'supervised_middle'),
    ('distilled', 'distill'),
  )
  if options.smoke:
    return common.smoke(config)
  return config
