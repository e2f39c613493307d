"""Tensors on their way through a disk: resumed, checked and placed."""

import pathlib
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from covenant.protocol import piece_files
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import bucket as bucket_lib
from covenant.store import interface as store_lib
from covenant.store import location as location_lib
from covenant.train import pieces as pieces_lib

PIECE = 1000


class PieceFilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir().full_path
    location = location_lib.Location.parse(f'memory://{self.id()[-30:]}')
    self.storage = run_storage_lib.RunStorage(
      b'r' * 16, bucket_lib.open_bucket(location), b'', lambda data: None
    )
    self.path = pathlib.Path(folder, 'w.tensor')
    self.enterContext(mock.patch.object(pieces_lib, 'PIECE_BYTES', PIECE))
    rng = np.random.default_rng(0)
    self.data = rng.bytes(3 * PIECE) + bytes(2 * PIECE) + rng.bytes(100)
    self.pieces = [
      self.data[i : i + PIECE] for i in range(0, len(self.data), PIECE)
    ]
    self.digests = [run_storage_lib.digest(x).hex() for x in self.pieces]

  def put(self, *numbers):
    for i in numbers:
      digest = bytes.fromhex(self.digests[i])
      key = self.storage.chunk_key(digest)
      self.storage.put_once(key, self.pieces[i])

  def fetch(self, wanted=None):
    """Fetches the tensor; returns the pieces that were asked for."""
    asked, real = [], self.storage.fetch_chunks

    def fetch_chunks(digests, *args):
      asked.extend(self.digests.index(digest.hex()) for digest in digests)
      return real(digests, *args)

    with mock.patch.object(self.storage, 'fetch_chunks', fetch_chunks):
      try:
        piece_files.fetch(
          self.storage,
          self.digests,
          len(self.data),
          [self.storage.bucket],
          self.path,
          wanted,
        )
      except store_lib.StoreError as e:
        return asked, e
    return asked, None

  def test_zeros_are_neither_sent_nor_fetched(self):
    self.put(0, 1, 2, 5)
    asked, error = self.fetch()
    self.assertIsNone(error)
    self.assertEqual(asked, [0, 1, 2, 5])
    self.assertEqual(self.path.read_bytes(), self.data)

  def test_goes_on_with_the_pieces_that_are_missing(self):
    self.put(0, 2)
    _, error = self.fetch()
    self.assertIsInstance(error, store_lib.MissingObjectError)
    self.put(1, 5)
    self.assertEqual(self.fetch(), ([1, 5], None))
    self.assertEqual(self.path.read_bytes(), self.data)

  def test_flipped_bits_are_fetched_again(self):
    self.put(0, 1, 2, 5)
    self.fetch()
    rotten = bytearray(self.data)
    rotten[PIECE + 7] ^= 1
    self.path.write_bytes(rotten)
    self.assertEqual(self.fetch(), ([1], None))
    self.assertEqual(self.path.read_bytes(), self.data)

  def test_a_process_writes_the_pieces_that_it_wants(self):
    self.put(1, 5)
    self.assertEqual(self.fetch({5, 1, 3}), ([1, 5], None))
    written = self.path.read_bytes()
    self.assertLen(written, len(self.data))
    for at in 1, 3, 5:
      some = slice(at * PIECE, at * PIECE + PIECE)
      self.assertEqual(written[some], self.data[some])
    self.assertEqual(written[:PIECE], bytes(PIECE))

  def test_the_pieces_of_shards(self):
    """Those with a value of a shard, for every device of a mesh."""
    mesh = jax.make_mesh((4, 2), ('a', 'b'), devices=jax.devices())
    for shape, spec in (
      ((8, 100), jax.P('a')), ((8, 100), jax.P(None, 'b')),
      ((8, 300), jax.P('b', 'a')), ((3, 4, 100), jax.P(None, 'a')),
      ((3, 300, 2), jax.P(None, 'a', 'b')), ((700,), jax.P('a')),
      ((5, 90), jax.P()), ((), jax.P()), ((0, 4), jax.P(None, 'a')),
    ):  # fmt: skip
      of_all = jax.NamedSharding(mesh, spec).devices_indices_map(shape)
      for device, index in of_all.items():
        own = mock.Mock()
        own.addressable_devices_indices_map.return_value = {device: index}
        abstract = mock.Mock(shape=shape, dtype=np.float32, sharding=own)
        mask = np.zeros(shape, np.uint32)
        mask[index] = 1
        data = mask.tobytes()
        expected = {
          i // PIECE
          for i in range(0, len(data), PIECE)
          if any(data[i : i + PIECE])
        }
        found = piece_files.pieces_of_shards(abstract)
        self.assertEqual(found, expected, (shape, index))

  def test_a_folder_that_is_named_survives_a_failure_only(self):
    self.storage.folder = self.path.parent / 'joining'
    with self.assertRaises(store_lib.StoreError):
      with piece_files.folder(self.storage) as folder:
        (folder / 'w.tensor').touch()
        raise store_lib.StoreError('broke off')
    self.assertTrue((self.storage.folder / 'w.tensor').exists())
    with piece_files.folder(self.storage):
      pass
    self.assertFalse(self.storage.folder.exists())

  def test_a_tensor_is_placed_on_its_shards(self):
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    self.path.write_bytes(x.tobytes())
    mesh = jax.make_mesh((2, 2), ('a', 'b'), devices=jax.devices()[:4])
    for spec in jax.P('a', 'b'), jax.P('b'), jax.P():
      where = jax.NamedSharding(mesh, spec)
      abstract = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
      placed = piece_files.place(self.path, abstract)
      np.testing.assert_array_equal(placed, x)
      self.assertEqual(placed.sharding, where)


if __name__ == '__main__':
  absltest.main()
