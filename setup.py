"""Installs linearizer_jax; `kernels/` becomes `linearizer_jax.kernels`."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r"__version__ = '([^']+)'", (ROOT / 'linearizer_jax/__init__.py').read_text()
).group(1)

# jax 0.10.2 is the newest for Python 3.11; 3.12 and later take 0.11.
JAX = '>=0.10.2,<0.12'

# Faster training crops (data.decoder='simd'); the second has no wheel for Linux
# on ARM, where pip compiles it, which needs Rust.
SIMD = ['simplejpeg>=1.8', 'cykooz-resizer>=4.0']
DEMO = ['matplotlib>=3.8', 'scikit-learn>=1.4']

setup(
  name='linearizer_jax',
  version=VERSION,
  description=(
    'ViT-Linearizer in JAX: distil a vision transformer into a linear-time '
    'Mamba-2 student on TPU, GPU or CPU'
  ),
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  # `kernels` alone would overwrite another package of that import name.
  package_dir={'linearizer_jax.kernels': 'kernels'},
  packages=find_packages(include=['linearizer_jax', 'linearizer_jax.*'])
  + [
    'linearizer_jax.kernels',
    'linearizer_jax.kernels.compare',
    'linearizer_jax.kernels.ssd',
  ],
  package_data={'linearizer_jax': ['weights/*/*']},
  install_requires=[
    f'jax{JAX}',
    'flax>=0.12',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.32',
    'grain>=0.2.15',
    'tensorflow-datasets>=4.9.9',
    'ml_collections>=1.1',
    'absl-py>=2.1',
    'chex>=0.1.90',
    'einops>=0.8',
    'huggingface_hub>=0.30',
    'numpy>=1.26',
    'pillow>=10.3',
    'safetensors>=0.5',
    'tensorboardX>=2.6.2',
    'tqdm>=4.66',
  ],
  extras_require={
    'tpu': [f'jax[tpu]{JAX}'],
    'cuda': [f'jax[cuda13]{JAX}'],
    'torch': ['torch>=2.4'],
    'onnx': [
      'torch>=2.6',
      'onnx>=1.17',
      'onnxruntime>=1.20',
      'onnxscript>=0.2',
    ],
    'demo': DEMO,
    'simd': SIMD,
    'test': DEMO
    + [f'{name}; platform_machine != "aarch64"' for name in SIMD]
    + ['pytest>=8', 'pytest-xdist>=3.6', 'ruff==0.17.6'],
  },
)
