from typing import Protocol

from absl.testing import absltest

from covenant import proxy
from covenant.chain import interface as chain_lib
from covenant.store import interface as store_lib


class Counter(Protocol):
  name: str

  def add(self, amount: int, *, twice: bool = False) -> int: ...

  def _hidden(self) -> None: ...


class ProxyTest(absltest.TestCase):
  def test_methods_end_in_the_function(self):
    calls = []

    def call(method, *args, **kwargs):
      calls.append((method, args, kwargs))
      return 7

    counter = proxy.make(Counter, call, name='mine')
    self.assertEqual(counter.add(3, twice=True), 7)
    self.assertEqual(calls, [('add', (3,), {'twice': True})])
    self.assertEqual(counter.name, 'mine')
    self.assertFalse(hasattr(counter, '_hidden'))

  def test_errors_pass(self):
    def call(method, *args):
      raise KeyError(method)

    with self.assertRaisesRegex(KeyError, 'add'):
      proxy.make(Counter, call).add(1)

  def test_equals_only_itself(self):
    one, two = (proxy.make(Counter, print) for _ in range(2))
    self.assertLen({one, two, one}, 2)

  def test_has_all_methods_of_the_interfaces(self):
    chain = proxy.make(chain_lib.Chain, lambda method, *_: method)
    self.assertEqual(chain.block_hash(3), 'block_hash')
    self.assertEqual(chain.verify('a', b'', b''), 'verify')
    bucket = proxy.make(store_lib.Bucket, lambda method, *_: method)
    self.assertEqual(bucket.list('a/'), 'list')


if __name__ == '__main__':
  absltest.main()
