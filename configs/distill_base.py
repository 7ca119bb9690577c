"""CLIP ViT-B/16 -> Adventurer-Base on ImageNet-1k: the paper's main run.

  python main.py --config=configs/distill_base.py --workdir=DIR
  python main.py --config=configs/distill_base.py:epochs=100   # try this first
  python main.py --config=configs/distill_base.py:losses=features  # ours
  python main.py --config=configs/distill_base.py:smoke        # seconds, a CPU

Hardware: written for a TPU v5e-64 or larger, batch 2048; on fewer chips set
`--config.parallel.accumulate_steps`. Not run at full scale by us.
The number to expect is the paper's: 84.3 top-1 after configs/
finetune_imagenet.py, against 82.6 for the supervised student (method: 0.75 of
the tokens masked, K = 4, lambda = 1). The recipe is ours, after MaskDistill.
"""

from configs import common


def get_config(argument=None):
  options = common.parse(argument, epochs=300.0, losses='paper')
  config = common.base()
  config.epochs = options.epochs
  config.distill.update(common.losses(options.losses))
  config.student.drop_path = 0.1
  if options.smoke:
    return common.smoke(config)
  return config
