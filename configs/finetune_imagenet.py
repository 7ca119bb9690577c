"""Fine-tunes a network with the labels of ImageNet-1k.

  python main.py --config=configs/finetune_imagenet.py --config.init=DISTILLED
    --workdir=DIR
  python main.py --config=configs/finetune_imagenet.py:size=small,resolution=448
    --config.init=DISTILLED
  python main.py --config=configs/finetune_imagenet.py:teacher=clip_base_patch16

DISTILLED is the work directory of a distillation, say of distill_base.py, or a
released Adventurer. Mask token and prediction layer are dropped, a head is
added, positions are resized where the run was at another resolution. With
`teacher=` a row of the table of teachers is fine-tuned instead, from its
published weights; `--config.init` names others.

The numbers to expect are the paper's, top-1 in percent: at 224 px the distilled
student 83.1 (small), 84.3 (base), 85.0 (large) and CLIP ViT-B/16 84.7; at 448
px base 85.0 and CLIP ViT-B/16 85.3. The recipe is ours, the same at both
resolutions. Weights and their average are both evaluated (`accuracy`,
`ema_accuracy`). Not run at full scale by us.
"""

from configs import common


def get_config(argument=None):
  options = common.parse(
    argument, size='base', resolution=224, teacher='', epochs=0.0
  )
  large = 'large' in (options.teacher or options.size)
  config = common.base()
  config.task = 'classify'
  config.stages = ('finetune',)
  config.student.name = f'adventurer_{options.size}_patch16'
  if options.teacher:
    config.train_role = 'teacher'
    config.teacher.name = config.init = options.teacher
  config[config.train_role].drop_path = 0.2 if large else 0.1
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
  config.data.image_size = options.resolution
  config.data.crop_scale = (0.08, 1.0)
  config.data.randaugment_ops = 2  # magnitude 9, deviation 0.5
  config.checkpoint.best_metric = 'ema_accuracy'
  if options.smoke:
    return common.smoke(config)
  return config
