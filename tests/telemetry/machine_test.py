import pathlib

from absl.testing import absltest
from absl.testing import parameterized

from covenant.telemetry import machine

GB = 10**9


class MachineTest(parameterized.TestCase):
  def root(self, cgroup, files):
    root = pathlib.Path(self.create_tempdir().full_path)
    for name, text in {'proc/self/cgroup': cgroup, **files}.items():
      path = root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return root

  def group(self, folder, limit, used, cached=0):
    v1 = '/memory' in folder
    names = (
      ('limit_in_bytes', 'usage_in_bytes', 'total_inactive_file')
      if v1
      else ('max', 'current', 'inactive_file')
    )
    return {
      f'{folder}/memory.{names[0]}': f'{limit}\n',
      f'{folder}/memory.{names[1]}': f'{used}\n',
      f'{folder}/memory.stat': f'anon 1\n{names[2]} {cached}\n',
    }

  @parameterized.named_parameters(
    ('v2', '0::/\n', 'sys/fs/cgroup'),
    ('v2_of_a_service', '0::/a/b\n', 'sys/fs/cgroup/a/b'),
    ('v2_above_it', '0::/a/b\n', 'sys/fs/cgroup/a'),
    ('v1', '5:cpu,cpuacct:/\n4:memory:/\n', 'sys/fs/cgroup/memory'),
    ('v1_of_docker', '4:memory:/docker/1f\n0::/x\n', 'sys/fs/cgroup/memory'),
  )
  def test_a_limit_is_the_memory_of_the_host(self, cgroup, folder):
    root = self.root(cgroup, self.group(folder, GB // 10, 5_000_000, 2_000_000))
    self.assertEqual(machine.memory_bytes(root), GB // 10)
    self.assertEqual(machine.free_bytes(root), GB // 10 - 3_000_000)

  @parameterized.named_parameters(
    ('none', '', {}),
    ('v2', '0::/\n', {'sys/fs/cgroup': 'max'}),
    ('v1', '4:memory:/\n', {'sys/fs/cgroup/memory': 0x7FFFFFFFFFFFF000}),
  )
  def test_without_a_limit(self, cgroup, limits):
    files = {}
    for folder, limit in limits.items():
      files |= self.group(folder, limit, 0)
    root = self.root(cgroup, files)
    everything = machine.psutil.virtual_memory().total
    self.assertEqual(machine.memory_bytes(root), everything)
    self.assertBetween(machine.free_bytes(root), 1, everything)

  def test_the_lowest_limit_holds(self):
    files = self.group('sys/fs/cgroup/a', 3 * GB // 10, 0)
    files |= self.group('sys/fs/cgroup/a/b', GB // 10, 0)
    self.assertEqual(
      machine.memory_bytes(self.root('0::/a/b\n', files)), GB // 10
    )

  def test_this_process(self):
    self.assertBetween(machine.used_bytes(), 1, machine.memory_bytes())
    self.assertGreater(machine.free_disk_bytes('/no/such/folder'), 0)


class AcceleratorTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      'proc/driver/nvidia/version',
      "an NVIDIA GPU: pip install -U 'jax[cuda13]'",
    ),
    ('dev/nvidia0', 'an NVIDIA GPU'),
    ('dev/accel0', "a TPU: pip install -U 'jax[tpu]'"),
    ('dev/kfd', 'an AMD GPU'),
  )
  def test_one_that_jax_does_not_use(self, path, text):
    root = pathlib.Path(self.create_tempdir().full_path)
    self.assertEqual(machine.idle_accelerator('cpu', root, {}), '')
    (root / path).parent.mkdir(parents=True)
    (root / path).touch()
    found = machine.idle_accelerator('cpu', root, {})
    self.assertIn(text, found)
    self.assertIn('docs/install.md', found)
    self.assertEqual(machine.idle_accelerator('gpu', root, {}), '')
    forced = machine.idle_accelerator('cpu', root, {'JAX_PLATFORMS': 'cpu'})
    self.assertEndsWith(forced, 'unset JAX_PLATFORMS=cpu')


if __name__ == '__main__':
  absltest.main()
