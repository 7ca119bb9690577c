"""Fine-tunes a distilled Adventurer with the labels of ImageNet-1k.

  python main.py --config=configs/finetune_imagenet.py --config.init=DISTILLED
    --workdir=DIR

DISTILLED is the work directory of a distillation, say of distill_base.py. Mask
token and prediction layer are dropped, a head is added. The numbers to expect
are the paper's, top-1 at 224 px: 83.1 (small), 84.3 (base), 85.0 (large).
Not run at full scale by us.
"""

from configs import common


def get_config(argument=None):
  options = common.parse(argument, size='base', epochs=0.0)
  large = options.size == 'large'
  config = common.base()
  config.task = 'classify'
  config.stages = ('finetune',)
  config.student.name = f'adventurer_{options.size}_patch16'
  config.student.drop_path = 0.2 if large else 0.1
  config.batch_size = 1024
  config.epochs = options.epochs or (50.0 if large else 100.0)
  config.optimizer.learning_rate = 5e-4
  config.optimizer.layer_decay = 0.75
  config.optimizer.ema_decay = 0.9999
  config.schedule.warmup_epochs = 5.0
  config.schedule.final_lr = 1e-6
  config.classify.label_smoothing = 0.1
  config.classify.mixup = 0.8
  config.classify.cutmix = 1.0
  config.data.crop_scale = (0.08, 1.0)
  config.data.randaugment_ops = 2  # magnitude 9, deviation 0.5
  config.checkpoint.best_metric = 'ema_accuracy'
  if options.smoke:
    return common.smoke(config)
  return config
