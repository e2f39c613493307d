"""Leaders that sign two manifests for one round."""

from covenant.node import validator as validator_lib
from covenant.protocol import run_storage as run_storage_lib
from covenant.wire import manifest as manifest_lib
from experiments.chaos import faults


class Equivocator(validator_lib.Validator):
  """Signs two manifests, and commits to one of them."""

  def _two(self, r: int, data: bytes) -> tuple[bytes, bytes]:
    manifest = manifest_lib.decode(data, self.chain.verify)
    other = manifest._replace(entries=manifest.entries[1:])
    return data, manifest_lib.encode(other, self.chain.sign)

  def _stand_for(self, r: int, data: bytes, head: int) -> None:
    one, two = self._two(r, data)
    assert isinstance(self.chain, faults.Chain)
    self.chain.faults.struck(faults.Kind.TWO)
    self._publish(r, one, two)
    self.commit(r, run_storage_lib.digest(one), head)

  def _publish(self, r: int, one: bytes, two: bytes) -> None:
    for data in one, two:
      key = self.objects.key('proposals', r, run_storage_lib.digest(data))
      self.objects.put_once(key, data)


class Liar(Equivocator):
  """Commits to one manifest, and serves the other in its place."""

  def _publish(self, r: int, one: bytes, two: bytes) -> None:
    self.objects.put_once(
      self.objects.key('proposals', r, run_storage_lib.digest(one)), two
    )


class Withholder(Equivocator):
  """Commits to a manifest that nobody ever sees."""

  def _publish(self, r: int, one: bytes, two: bytes) -> None:
    pass
