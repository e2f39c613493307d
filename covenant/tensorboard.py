"""TensorBoard's event files, written without TensorFlow.

A file is a sequence of TFRecords, each a serialized `Event` message
(tensorflow/core/util/event.proto).
"""

import os
import pathlib
import socket
import struct
import time

_CASTAGNOLI = 0x82F63B78  # the reflected polynomial of CRC-32C


def _crc_table() -> tuple[int, ...]:
  """Returns the remainder of every byte."""
  table = []
  for byte in range(256):
    for _ in range(8):
      byte = (byte >> 1) ^ (_CASTAGNOLI if byte & 1 else 0)
    table.append(byte)
  return tuple(table)


_CRC_TABLE = _crc_table()
_NAME = 'events.out.tfevents.'


class EventWriter:
  """Writes the scalars of one start of a run.

  Args:
    folder: the folder of the event files; created if missing.
    purge_step: the step from which TensorBoard ignores earlier files.
  """

  def __init__(self, folder: str | os.PathLike[str], purge_step: int):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files by name, whatever the clock was set to meanwhile.
    known = [x.name.split('.')[3] for x in folder.glob(f'{_NAME}*')]
    last = max((int(x) for x in known if x.isdecimal()), default=-1)
    number = max(int(time.time()), last + 1)
    name = f'{number:010d}.{socket.gethostname()}.from{purge_step}'
    self._file = open(folder / f'{_NAME}{name}', 'ab')
    self._write(_text(3, b'brain.Event:2'))  # file_version
    self._write(_integer(2, purge_step) + _text(7, _integer(1, 1)))

  def add_scalar(self, tag: str, value: float, step: int) -> None:
    """Writes one value of a curve."""
    simple_value = _key(2, 5) + struct.pack('<f', value)
    summary = _text(1, _text(1, tag.encode()) + simple_value)
    self._write(_integer(2, step) + _text(5, summary))

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()

  def _write(self, fields: bytes) -> None:
    """Appends an event, with the time, as a TFRecord."""
    event = _key(1, 1) + struct.pack('<d', time.time()) + fields
    length = struct.pack('<Q', len(event))
    self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _key(field: int, wire_type: int) -> bytes:
  return bytes([field << 3 | wire_type])


def _varint(value: int) -> bytes:
  """Returns a non-negative integer in protobuf's encoding.

  >>> _varint(300).hex()
  'ac02'
  """
  digits = bytearray()
  while value > 127:
    digits.append(value & 127 | 128)
    value >>= 7
  return bytes([*digits, value])


def _integer(field: int, value: int) -> bytes:
  return _key(field, 0) + _varint(value)


def _text(field: int, data: bytes) -> bytes:
  return _key(field, 2) + _varint(len(data)) + data


def _masked_crc(data: bytes) -> bytes:
  """Returns TFRecord's masked CRC-32C.

  >>> _masked_crc(b'123456789').hex()  # the CRC is 0xe3069283
  'e5b08ac7'
  """
  crc = 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
  crc ^= 0xFFFFFFFF
  masked = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack('<I', masked & 0xFFFFFFFF)
