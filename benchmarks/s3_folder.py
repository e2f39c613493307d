"""An S3 server on the loopback, for benchmarks: it serves a folder, to read.

  python -m benchmarks.s3_folder FOLDER    prints its port

It ends when its standard input closes.
"""

import contextlib
import http.server
import os
import pathlib
import re
import sys
import threading


class _Handler(http.server.BaseHTTPRequestHandler):
  """Serves a folder as S3 does: HEAD, GET and ranges."""

  protocol_version = 'HTTP/1.1'
  folder = ''

  def log_message(self, format: str, *args: object) -> None:
    pass

  def do_GET(self) -> None:  # noqa: N802
    name = self.path.partition('?')[0].rpartition('/')[2]
    with open(pathlib.Path(self.folder, name), 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      asked = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers.get('Range', ''))
      start, stop = 0, size
      self.send_response(206 if asked else 200)
      if asked:
        start, stop = int(asked[1]), min(int(asked[2]) + 1, size)
        self.send_header('Content-Range', f'bytes {start}-{stop - 1}/{size}')
      self.send_header('Content-Length', str(stop - start))
      self.send_header('ETag', f'"{name}"')
      self.send_header('Last-Modified', 'Thu, 01 Jan 2026 00:00:00 GMT')
      self.end_headers()
      self.wfile.flush()
      # A reader hangs up once it has the part that it wants.
      with contextlib.suppress(ConnectionError):
        while start < stop and self.command == 'GET':
          start += os.sendfile(
            self.connection.fileno(), file.fileno(), start, stop - start
          )

  do_HEAD = do_GET  # noqa: N815


def serve(folder: str) -> None:
  """Serves a folder until standard input closes; prints the port."""
  _Handler.folder = folder
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    server.shutdown()


if __name__ == '__main__':
  serve(sys.argv[1])
