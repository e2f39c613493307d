"""Changes to the bytes of strangers, for tests of parsers."""

from hypothesis import strategies as st

# Bytes that parsers of text and JSON look out for.
_TELLING = (
  b'[', b']', b'{', b'}', b'"', b'\\', b',', b':', b'0', b'-', b'.', b'e',
  b'null', b'true', b'NaN', b'1e999', b'\\u0000', b'\\ud800', b'\x00', b'\xff',
  b'../', b'\r\n', b' ', b'9' * 5000, b'[' * 3000, b'{"a":' * 3000,
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, data: bytes, most: int = 4) -> bytes:
  """Draws bytes that differ from `data` in up to `most` places.

  Bits are flipped; runs of bytes are cut out, repeated, moved, replaced, or
  followed by bytes that parsers look out for.
  """
  changed = bytearray(data)
  for _ in range(draw(st.integers(1, most))):
    if not changed:
      break
    start = draw(st.integers(0, len(changed) - 1))
    size = draw(st.sampled_from((1, 2, 4, 8, 64, 1000)))
    run = bytes(changed[start : start + size])
    match draw(st.integers(0, 6)):
      case 0:
        changed[start] ^= 1 << draw(st.integers(0, 7))
      case 1:
        del changed[start : start + size]
      case 2:
        changed[start:start] = run
      case 3:
        to = draw(st.integers(0, len(changed)))
        changed[to:to] = run
      case 4:
        changed[start : start + size] = draw(st.binary(max_size=16))
      case 5:
        changed[start:start] = draw(st.sampled_from(_TELLING))
      case 6:
        del changed[start:]
  return bytes(changed)
