"""CLIP ViT-B/16 -> Adventurer-Small on ImageNet-1k (44 M parameters).

  python main.py --config=configs/distill_small.py --workdir=DIR

The recipe is that of distill_base.py, without drop path. The number to expect
is the paper's: 83.1 top-1 after fine-tuning. Not run at full scale by us.
"""

from configs import common


def get_config(argument=None):
  options = common.parse(argument, epochs=300.0, losses='paper')
  config = common.base()
  config.epochs = options.epochs
  config.distill.update(common.losses(options.losses))
  config.student.name = 'adventurer_small_patch16'
  if options.smoke:
    return common.smoke(config)
  return config
