"""Sections with bounds: built from mappings, edited by flags."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from covenant.config import schema


@dataclasses.dataclass(frozen=True)
class Wheel(schema.Section):
  spokes: int = schema.positive(32)
  width: float = schema.positive(2.5)


@dataclasses.dataclass(frozen=True)
class Bike(schema.Section):
  """A section with a field of each kind."""

  name: str = 'bike'
  wheel: Wheel = dataclasses.field(default_factory=Wheel)
  brake: str = schema.bounded('disc', choices=('disc', 'rim'))
  bell: str = schema.bounded('loud', choices=('loud',), plugin=True)
  gears: int = schema.bounded(3, low=1, high=12)
  used: bool = False
  slip: float = schema.fraction(0.5)
  size: tuple[int, int] = (50, 60)
  riders: tuple[str, ...] = schema.names()
  spares: tuple[Wheel, ...] = ()

  def check(self) -> None:
    schema.require(
      self.gears > 1 or self.brake == 'rim', 'gears', 'one gear needs a rim'
    )


KNOWN = [leaf.path for leaf in schema.leaves(Bike())]


def build(raw):
  return schema.build(Bike, raw, '', KNOWN)


def raw():
  return {'wheel': {}}


class LeavesTest(absltest.TestCase):
  def test_every_field_has_its_path(self):
    self.assertEqual(
      KNOWN,
      ['name', 'wheel.spokes', 'wheel.width', 'brake', 'bell', 'gears', 'used',
       'slip', 'size', 'riders', 'spares'],
    )  # fmt: skip

  def test_a_tuple_with_a_text_is_shown_as_that(self):
    bike = dataclasses.replace(Bike(), riders=('ann', 'bob'))
    shown = {leaf.path: leaf.shown for leaf in schema.leaves(bike)}
    self.assertEqual(shown['riders'], "'ann,bob'")
    self.assertEqual(shown['size'], '(50, 60)')


class BuildTest(parameterized.TestCase):
  def test_what_is_missing_has_its_default(self):
    self.assertEqual(build({}), Bike())
    self.assertEqual(build({'wheel': {'spokes': 3}}).wheel, Wheel(spokes=3))

  def test_values_of_every_kind(self):
    bike = build({
      'slip': 1,  # an integer may stand for a float
      'size': [1, 2],  # as JSON has it
      'riders': 'ann, bob',  # as a flag has it
      'spares': [{'spokes': 5}, Wheel(spokes=6)],
      'bell': 'bells.py:ring',
    })  # fmt: skip
    self.assertEqual((bike.slip, bike.size), (1.0, (1, 2)))
    self.assertIsInstance(bike.slip, float)
    self.assertEqual(bike.riders, ('ann', 'bob'))
    self.assertEqual(bike.spares, (Wheel(spokes=5), Wheel(spokes=6)))
    self.assertEqual(bike.bell, 'bells.py:ring')

  @parameterized.parameters(
    ({'gears': 0}, 'gears: expected at least 1, got 0'),
    ({'gears': 13}, 'gears: expected at most 12, got 13'),
    ({'gears': 2.0}, 'gears: expected int, got float 2.0'),
    ({'gears': True}, 'gears: expected int, got bool True'),
    ({'used': 1}, 'used: expected bool, got int 1'),
    ({'slip': float('inf')}, 'slip: expected a finite number, got inf'),
    ({'slip': -0.5}, 'slip: expected at least 0.0, got -0.5'),
    ({'wheel': {'width': 0}}, 'wheel.width: expected more than 0, got 0.0'),
    ({'wheel': 3}, 'wheel: expected a section, got 3'),
    ({'brake': 'x.py:y'}, r"brake: expected one of \('disc', 'rim'\), got 'x"),
    ({'bell': 'soft'}, r"bell: expected one of .* or 'file.py:attribute', got"),
    ({'size': (1, 2, 3)}, r'size: expected 2 numbers, got \(1, 2, 3\)'),
    ({'size': (1, 'x')}, "size: expected int, got str 'x'"),
    ({'size': 1}, 'size: expected 2 numbers, got 1'),
    ({'riders': 1}, 'riders: expected a tuple, got 1'),
    ({'riders': ['ann', 1]}, r'riders\[1\]: expected str, got int 1'),
    ({'spares': [{'spokes': 0}]}, r'spares\[0\].spokes: expected at least 1'),
    ({'gear': 2}, r'gear: no such field; did you mean gears\?'),
    ({'wheel': {'spoke': 2}}, r'wheel.spoke: no such.* mean wheel.spokes\?'),
    ({'xyzzy': 2}, 'xyzzy: no such field; see covenant/config/'),
    ({'gears': 1}, 'gears: one gear needs a rim'),
  )  # fmt: skip
  def test_names_the_field_and_what_is_allowed(self, raw, message):
    with self.assertRaisesRegex(schema.ConfigError, f'^{message}'):
      build(raw)


class OverrideTest(parameterized.TestCase):
  @parameterized.parameters(
    ('name=a=b', 'name', 'a=b'),
    ('gears=5', 'gears', 5),
    ('slip=1e-1', 'slip', 0.1),
    ('used=True', 'used', True),
    ('used=0', 'used', False),
    ('size=(1, 2)', 'size', (1, 2)),
    ('riders=ann, ,bob', 'riders', ('ann', 'bob')),
    ('riders=', 'riders', ()),
    ('wheel.spokes=7', 'wheel', Wheel(spokes=7)),
  )
  def test_reads_the_type_of_the_field(self, edit, field, value):
    edited = raw()
    schema.override(edited, edit, Bike())
    self.assertEqual(getattr(build(edited), field), value)

  @parameterized.parameters(
    ('gears=many', "gears: expected int, got 'many'"),
    ('gears=5.5', "gears: expected int, got '5.5'"),
    ('used=perhaps', "used: expected true or false, got 'perhaps'"),
    ('size=1 2', "size: expected tuple, got '1 2'"),
    ('gears', 'gears: expected --config.gears=VALUE'),
    ('wheel=3', 'wheel: no such field'),
    ('spokes=3', r'spokes: no such field; did you mean wheel.spokes\?'),
  )
  def test_names_the_field(self, edit, message):
    with self.assertRaisesRegex(schema.ConfigError, f'^{message}'):
      schema.override(raw(), edit, Bike())


if __name__ == '__main__':
  absltest.main()
