"""The orders that the holders of stages are sent, each once."""

import json
from collections.abc import Callable, Iterable

from covenant.pool import orders as orders_lib
from covenant.pool import seat as seat_lib

Part = Callable[[orders_lib.Order, int], orders_lib.Order]


class SeatOrders:
  """Brings stages to the end of a log.

  Args:
    log: the orders.
    part: returns the part of an order for a stage.
  """

  def __init__(self, log: orders_lib.OrderLog, part: Part):
    self._log, self._part = log, part

  def bring(self, seat: seat_lib.Seat) -> None:
    """Sends a stage its next order, if there is one."""
    is_behind = 0 <= seat.number < self._log.number
    if not is_behind or not seat.tell(seat.number):
      return
    if (order := self._log.get(seat.number)) is not None:
      text, data = orders_lib.encode(self._part(order, seat.stage))
      text |= {'do': 'order', 'stage': seat.stage, 'after': order.after}
      seat.send(text, data)

  def reset(self, seat: seat_lib.Seat) -> None:
    """Lets a stage begin from the base of the log."""
    seat.number = -1
    if seat.tell(seat_lib.RESET):
      base = self._log.base
      text = {'do': 'reset', 'stage': seat.stage, 'number': base.number}
      text |= {'id': base.id, 'places': base.places}
      seat.send(text, json.dumps(base.files).encode())

  def go_back(self, seats: Iterable[seat_lib.Seat], number: int) -> None:
    """Restarts the stages that have left the history, or may have.

    Args:
      seats: the stages.
      number: of the first order that others have replaced.
    """
    for seat in seats:
      was_told = seat.reached >= number
      if seat.number < 0:
        seat.reached = seat_lib.TAKE  # its answer may be of the past
      elif was_told or not self._log.has(seat.number, seat.id):
        seat.reached = seat_lib.TAKE
        self.reset(seat)
