"""A run of one stage on generated images that compiles fast.

python main.py --config=tests/tiny.py:distill --workdir=DIR
"""

from configs import common


def get_config(task=None):
  config = common.smoke(common.base())
  config.task = task or 'classify'
  config.stages = ('stage',)
  config.steps = 6
  config.data.color_jitter = 0.1
  config.student.name = 'vit_tiny_patch16'
  config.student.head_dim = config.student.state_dim = None
  config.student.num_heads = 2
  for role in ('student', 'teacher'):
    config[role].width, config[role].depth = 16, 2
    config[role].dtype = 'float32'
  config.distill.num_stages = 2
  return config
