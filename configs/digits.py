"""The embedded run: the whole method on real images, on a laptop.

  python main.py                      # this config is the default
  python main.py --config=configs/digits.py:losses

Trains a small ViT on scikit-learn's 1,797 handwritten digits, distils an
Adventurer from it without labels, fine-tunes that on 100 labels, and trains the
same student on the same 100 labels alone, as many updates as both together,
at three learning rates. Prints the table, draws the loss curves and the
activation maps.
"""

from configs import common

# Rows of `:losses`: the distillation with other losses.
LOSSES = {
  'matching': dict(mask_weight=0.0),
  'prediction': dict(match_weight=0.0),
  'features': dict(
    match_weight=0.0, mask_weight=0.0, mask_ratio=0.0, feature_weight=1.0
  ),
}
# Of the supervised student; the best of the three counts.
RATES = {'low': 3e-4, 'middle': 1e-3, 'high': 3e-3}
DISTILL_STEPS, FINETUNE_STEPS = 800, 200


def get_config(argument=None):
  options = common.parse(argument, losses=False)
  config = common.base()
  config.data.name = 'digits'
  config.data.image_size = 14  # 49 tokens of 2 x 2 pixels
  config.data.crop_scale = None
  config.data.flip = False
  config.data.shift_pixels = 1
  config.data.rotate_degrees = 12.0
  config.data.eval_crop = 1.0
  config.data.num_workers = 0
  config.data.labels_seed = config.get_ref('seed')
  config.batch_size = 64
  config.eval_batch_size = 120
  config.log.every_steps = 20
  config.log.eval_every_epochs = 0.0
  config.checkpoint.every_steps = 200
  config.checkpoint.keep_last = 1
  config.optimizer.learning_rate = 2e-3
  config.optimizer.b2 = 0.95
  config.schedule.warmup_epochs = 5.0

  config.student.name = 'adventurer_tiny_patch16'
  config.teacher.name = 'vit_tiny_patch16'
  for section in (config.student, config.teacher):
    section.dtype = 'float32'
    section.width, section.depth, section.patch_size = 64, 4, 2
  config.student.head_dim = 64
  config.student.state_dim = 16
  config.teacher.num_heads = 2
  config.teacher.weights = 'stage:teacher'

  labels = dict(labels_per_class=10)
  few = dict(
    task='classify',
    data=labels,
    batch_size=50,
    schedule=dict(warmup_epochs=20.0),
    log=dict(every_steps=20),
  )
  teacher = dict(task='classify', train_role='teacher', steps=500)
  per_stage = {
    'teacher': teacher,
    'distill': dict(steps=DISTILL_STEPS),
    'finetune': few
    | dict(
      init='stage:distill',
      steps=FINETUNE_STEPS,
      optimizer=dict(learning_rate=1e-3, layer_decay=0.75),
    ),
  }
  for name, rate in RATES.items():
    per_stage[f'supervised_{name}'] = few | dict(
      steps=DISTILL_STEPS + FINETUNE_STEPS,
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
  config.stages = tuple(per_stage)
  config.per_stage = per_stage
  config.report.metric = 'accuracy'
  config.report.rows = rows
  config.report.nearest_neighbour = 'finetune'  # on this stage's labels
  config.report.maps = {
    'teacher': 'teacher',
    'supervised': 'supervised_middle',
    'distilled': 'distill',
  }
  if options.smoke:
    return common.smoke(config)
  return config
