"""State space dual scan of Mamba-2; see api.py for the one public function."""

from linearizer_jax.kernels.ssd.api import ssd

__all__ = ['ssd']
