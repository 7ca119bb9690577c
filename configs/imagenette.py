"""Small networks on ten classes of ImageNet, from a folder of JPEG files.

  python main.py --config=configs/imagenette.py --config.data.data_dir=FOLDER

FOLDER holds train/ and val/ with a folder of images per class, as Imagenette is
published. Trains a ViT teacher, distils an Adventurer from it without labels
and fine-tunes that, at 64 px in patches of 8.
"""

from configs import common


def get_config(argument=None):
  options = common.parse(argument, size=64, teacher_epochs=60.0, epochs=60.0)
  config = common.base()
  config.data.name = 'folder'
  config.data.image_size = options.size
  config.data.num_workers = 2
  config.data.crop_scale = (0.35, 1.0)
  config.data.color_jitter = 0.2
  config.batch_size = 128
  config.eval_batch_size = 128
  config.epochs = options.epochs
  config.optimizer.learning_rate = 1e-3
  config.schedule.warmup_epochs = 5.0
  config.checkpoint.every_steps = 200

  config.student.name = 'adventurer_tiny_patch8'
  config.teacher.name = 'vit_tiny_patch8'
  for section in (config.student, config.teacher):
    section.dtype = 'float32'
    section.width, section.depth = 128, 6
  config.student.head_dim = 32
  config.student.state_dim = 32
  config.teacher.num_heads = 4
  config.teacher.weights = 'stage:teacher'

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
  if options.smoke:
    return common.smoke(config)
  return config
