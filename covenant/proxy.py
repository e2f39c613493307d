"""Objects with the methods of an interface that all end in one function.

So a chain or a bucket is wrapped, to measure it, to ask it elsewhere or to
inject faults, without a class that forwards every method by hand.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar('_T')


class _Proxy:
  """An object with given members, equal to itself only."""

  def __init__(self, members: dict[str, object]):
    vars(self).update(members)


def make(
  interface: type[_T], call: Callable[..., object], **attributes: object
) -> _T:
  """Returns an object whose method `m(...)` is `call('m', ...)`.

  >>> class Bucket:
  ...   def get(self, key, limit): ...
  >>> bucket = make(Bucket, print, location='here')
  >>> bucket.get('key', 3)
  get key 3

  Args:
    interface: the protocol; its public functions become the methods.
    call: receives the name of a method and its arguments.
    **attributes: the other members, such as `location`.
  """
  methods = {
    name: functools.partial(call, name)
    for name, member in vars(interface).items()
    if callable(member) and not name.startswith('_')
  }
  proxy: Any = _Proxy(methods | attributes)
  return proxy
