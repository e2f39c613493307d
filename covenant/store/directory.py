"""The buckets of other peers, by location, and which of them failed lately.

Peers are strangers: a location may be dead, slow, or serve other bytes than
were asked for, and a peer may name a new one in every round. So a location that
failed is tried after all others for some rounds, and only as many are kept open
as a subnet has peers.
"""

import threading
from collections.abc import Callable, Collection, Iterable

from covenant.store import interface

MOST_OPEN = 512  # buckets; a subnet has 256 peers
FORGIVEN = 8  # rounds after which a failure is forgotten

Open = Callable[[bytes], interface.Bucket]  # a location from the chain


class Directory:
  """Opens buckets and remembers their failures. Safe for many threads.

  Args:
    open_bucket: opens the bucket at a location.
  """

  def __init__(self, open_bucket: Open):
    self._open = open_bucket
    # In the order of their last use.
    self._buckets: dict[bytes, interface.Bucket] = {}
    self._failed: dict[str, int] = {}  # by public address: the newest round
    self._round = 0
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._buckets)

  def bucket_at(self, location: bytes) -> interface.Bucket | None:
    """Returns the bucket at a location; None if the location is unusable."""
    with self._lock:
      bucket = self._buckets.pop(location, None)
      if bucket is None:
        try:
          bucket = self._open(location)
        except (ValueError, interface.StoreError):  # it is not trusted
          return None
      self._buckets[location] = bucket
      while len(self._buckets) > MOST_OPEN:
        del self._buckets[next(iter(self._buckets))]
      return bucket

  def locations(self, buckets: Iterable[interface.Bucket]) -> list[bytes]:
    """Returns the locations of buckets that `bucket_at` has returned."""
    with self._lock:
      known = {bucket: at for at, bucket in self._buckets.items()}
    return [known[bucket] for bucket in buckets if bucket in known]

  def keep_only(self, locations: Collection[bytes]) -> None:
    """Closes all buckets but those at some locations."""
    with self._lock:
      self._buckets = {
        location: bucket
        for location, bucket in self._buckets.items()
        if location in locations
      }
      known = {bucket.location for bucket in self._buckets.values()}
      self._failed = {a: r for a, r in self._failed.items() if a in known}

  def begin(self, round_index: int) -> None:
    """Forgets failures of rounds long before this one."""
    with self._lock:
      self._round = max(self._round, round_index)
      oldest = self._round - FORGIVEN
      self._failed = {a: r for a, r in self._failed.items() if r > oldest}

  def note(
    self, bucket: interface.Bucket, error: interface.StoreError | None
  ) -> None:
    """Remembers how a bucket answered; None is a good answer.

    An object that is missing is no failure: not every mirror has it.
    """
    with self._lock:
      if error is None:
        self._failed.pop(bucket.location, None)
      elif not isinstance(error, interface.MissingObjectError):
        self._failed[bucket.location] = self._round

  def failed(self, bucket: interface.Bucket) -> bool:
    """Returns whether a bucket failed lately."""
    return bucket.location in self._failed

  def by_trust(
    self, buckets: Iterable[interface.Bucket]
  ) -> list[interface.Bucket]:
    """Returns different buckets in their order, those that failed last."""
    return sorted(dict.fromkeys(buckets), key=self.failed)
