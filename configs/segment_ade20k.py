"""Semantic segmentation of ADE20K with UperNet on a distilled Adventurer.

  python main.py --config=configs/segment_ade20k.py --config.init=DISTILLED
    --config.data.data_dir=ADEChallengeData2016 --workdir=DIR
  python main.py --config=configs/segment_ade20k.py:smoke   # seconds, a CPU

DISTILLED is the work directory of a distillation, an exported folder or a
released Adventurer. The folder is the data set as published (images/ and
annotations/, each with training/ and validation/).
`--config.task=evaluate_segment --config.init=DIR` scores a finished run again,
`--config.data.eval_window=0` with whole images instead of windows.

Recipe (ours; the paper's was not to be had): AdamW 5e-5, weight decay 0.01,
batch 16, 160,000 steps, 1,500 of warm-up, cosine to 0; crops of 512 at 0.5 to 2
times a shorter side of 512; windows of 512 with stride 341. Positions stay
those of `config.student.image_size`, which has to be that of DISTILLED, and are
resized to each image. Written for 8 or 16 accelerators. The numbers to expect
are the paper's, single scale mIoU: 51.3 distilled, 47.8 supervised, 51.0 the
teacher. Not run at full scale by us.
"""

from configs import common

STEPS, WARMUP_STEPS, TRAIN_IMAGES = 160_000, 1500, 20210


def get_config(argument=None):
  options = common.parse(argument, size='base', head='upernet')
  config = common.base()
  config.task = 'segment'
  config.stages = ('segment',)
  config.student.name = f'adventurer_{options.size}_patch16'
  config.student.image_size = 224
  config.student.drop_path = 0.2 if options.size == 'large' else 0.1
  config.segment.head = options.head
  config.batch_size = 16
  config.eval_batch_size = 16
  config.steps = STEPS
  config.optimizer.learning_rate = 5e-5
  config.optimizer.weight_decay = 0.01
  config.optimizer.b2 = 0.999
  config.schedule.warmup_epochs = WARMUP_STEPS * 16 / TRAIN_IMAGES
  config.schedule.final_lr = 0.0
  config.data.name = 'ade20k'
  config.data.dense = True
  config.data.image_size = 512
  config.data.short_side = 512
  config.data.eval_crop = 1.0
  config.data.color_jitter = 0.4
  config.data.eval_window = 512
  config.data.eval_stride = 341
  config.log.eval_every_epochs = 16000 * 16 / TRAIN_IMAGES
  config.checkpoint.best_metric = 'mIoU'
  config.report.metric = 'mIoU'
  if options.smoke:
    return common.smoke(config)
  return config
