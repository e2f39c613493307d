import jax
import numpy as np
from absl.testing import absltest
from absl.testing import parameterized

from covenant import config as config_lib
from covenant.models import sharding
from covenant.optim import host_copy


class HostCopyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices = config_lib.Devices(data=2, fsdp=2, tensor=2)
    self.mesh = sharding.mesh(devices, jax.devices())

  def on_mesh(self, x, *spec):
    return jax.device_put(x, jax.NamedSharding(self.mesh, jax.P(*spec)))

  @parameterized.parameters(
    (), (None, 'fsdp', 'tensor'), (None, None, ('fsdp', 'tensor')),
    ('fsdp', None, 'tensor'), (('tensor', 'fsdp'),),
  )  # fmt: skip
  def test_devices_gather_pieces_as_the_host_does(self, *spec):
    """Also the bits of what is not a number, and the sign of zero."""
    x = np.arange(8 * 4 * 8, dtype=np.float32).reshape(8, 4, 8)
    x[2, 1] = np.nan, -np.nan, -0.0, 0.0, np.inf, -1.0, 1e-45, 7.0
    lies = self.on_mesh(x, *spec)
    some = (1, 8), (3 * 32, 3), (10_000, 1)
    for is_here in True, False:
      with self.patched(lambda _, is_here=is_here: is_here):
        for budget, want in some:
          pieces = list(host_copy.stream(lies, budget))
          self.assertLen(pieces, want)
          found = np.concatenate(pieces)
          self.assertEqual(found.tobytes(), x.tobytes())
        self.assertEqual(host_copy.whole(lies).tobytes(), x.tobytes())

  def patched(self, is_here):
    return absltest.mock.patch.object(host_copy, '_is_here', is_here)

  @parameterized.parameters(np.uint8, np.uint16, np.int32, np.float32)
  def test_dtypes_and_ranks(self, dtype):
    x = np.arange(24).astype(dtype)
    with self.patched(lambda _: False):
      lies = self.on_mesh(x, 'fsdp')
      np.testing.assert_array_equal(host_copy.whole(lies), x)
      pieces = list(host_copy.stream(lies, 10))
      np.testing.assert_array_equal(np.concatenate(pieces), x)

  def test_numbers_and_arrays_of_the_host(self):
    self.assertEqual(host_copy.whole(np.float32(3)), 3)
    self.assertEqual(host_copy.whole(self.on_mesh(np.float32(3))), 3)
    self.assertLen(list(host_copy.stream(np.zeros((3, 4)), 1)), 1)


if __name__ == '__main__':
  absltest.main()
