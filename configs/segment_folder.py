"""Semantic segmentation of your own images, small enough for a CPU.

  python main.py --config=configs/segment_folder.py:data=FOLDER,classes=11
  python main.py --config=configs/segment_folder.py:smoke

FOLDER holds train/ and val/, each with images/ (JPEG or PNG) and labels/ (a PNG
of the same name with one class id a pixel, grey or with a palette), or images/,
labels/ and lists train.txt and val.txt. Ids from 0 to classes - 1; `ignore=11`
names one that is not scored, beside 255. CamVid's frames (480 x 360, ids 0 to
10, void 11): `:data=camvid,classes=11,ignore=11,short=120`.

The backbone starts from `--config.init`, the work directory of a distillation
of the same size (say `--config.student.width=512`), or at random. By default a
random Adventurer of width 128 and depth 4 in patches of 8, crops of 96 x 128
from images of 120 pixels, whole images in evaluation: minutes on two cores.
"""

from configs import common


def get_config(argument=None):
  options = common.parse(
    argument, data='', classes=2, ignore=255, short=120, steps=1000
  )
  config = common.base()
  config.task = 'segment'
  config.stages = ('segment',)
  config.student.name = 'adventurer_tiny_patch8'
  config.student.dtype = 'float32'
  config.student.width, config.student.depth = 128, 4
  config.student.head_dim = config.student.state_dim = 32
  config.segment.channels = config.segment.auxiliary_channels = 64
  config.batch_size = 16
  config.eval_batch_size = 4
  config.steps = options.steps
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.01
  config.optimizer.b2 = 0.999
  config.schedule.warmup_epochs = 2.0
  config.data.name = 'folder'
  config.data.data_dir = options.data
  config.data.num_classes = options.classes
  config.data.ignore_labels = tuple({255, options.ignore})
  config.data.dense = True
  config.data.image_size = (96, 128)
  config.data.short_side = options.short
  config.data.eval_crop = 1.0
  config.data.scale_range = (0.8, 2.0)
  config.data.color_jitter = 0.2
  config.data.num_workers = 0
  config.log.every_steps = 20
  config.log.eval_every_epochs = 0.0
  config.checkpoint.every_steps = 200
  config.report.metric = 'mIoU'
  if options.smoke:
    return common.smoke(config)
  return config
