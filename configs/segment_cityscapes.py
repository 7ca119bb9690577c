"""Semantic segmentation of Cityscapes with UperNet on a distilled Adventurer.

  python main.py --config=configs/segment_cityscapes.py --config.init=DISTILLED
    --config.data.data_dir=CITYSCAPES --workdir=DIR
  python main.py --config=configs/segment_cityscapes.py:smoke  # seconds, a CPU

DISTILLED is as in segment_ade20k.py. CITYSCAPES holds leftImg8bit/ and gtFine/
as published, labelIds files included; they are mapped to the 19 classes of the
benchmark. The recipe is that of segment_ade20k.py with crops of 512 x 1024 at
0.5 to 2 times the full size; evaluation sees the images of 1024 x 2048 whole,
or with `--config.data.eval_window='(512,1024)'` in windows. The numbers to
expect are the paper's mIoU: 82.0 distilled, 81.8 the teacher. Not run at full
scale by us.
"""

from configs import common, segment_ade20k

TRAIN_IMAGES = 2975


def get_config(argument=None):
  options = common.parse(argument, size='base', head='upernet')
  config = segment_ade20k.get_config(f'size={options.size},head={options.head}')
  config.data.name = 'cityscapes'
  config.data.image_size = (512, 1024)
  config.data.short_side = 0
  config.data.eval_window = 0
  config.data.eval_stride = 0
  config.schedule.warmup_epochs = 1500 * 16 / TRAIN_IMAGES
  config.log.eval_every_epochs = 16000 * 16 / TRAIN_IMAGES
  if options.smoke:
    return common.smoke(config)
  return config
