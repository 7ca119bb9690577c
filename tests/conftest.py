"""Eight virtual CPU devices for every test, and no look at accelerators."""

import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
flag = '--xla_force_host_platform_device_count=8'
if flag not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()
# Tests of resuming compile the same program twice; most of the time is that.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  os.path.join(tempfile.gettempdir(), 'linearizer_jax_test_cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
