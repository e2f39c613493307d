"""The event loop on which all buckets of a process work."""

import asyncio
import atexit
import functools
import threading
import time

_RELEASE_SECONDS = 0.05


@functools.cache
def get() -> asyncio.AbstractEventLoop:
  """Returns a loop that runs on a thread: callers may have their own loop.

  obstore takes cancellations and deadlines only from a loop.
  """
  loop = asyncio.new_event_loop()
  thread = threading.Thread(target=loop.run_forever, name='store', daemon=True)
  thread.start()

  def end() -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    # obstore's threads still release objects; one that needs the interpreter
    # after its end would abort the process.
    time.sleep(_RELEASE_SECONDS)

  atexit.register(end)
  return loop
