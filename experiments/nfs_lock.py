"""The lock of a workdir on NFS, between two hosts.

  python -m experiments.nfs_lock                    two minutes
  python -m experiments.nfs_lock --tools=FOLDER

It needs Debian's packages user-mode-linux, nfs-kernel-server, nfs-common,
rpcbind, iproute2 and kmod, installed or, with --tools, unpacked by `dpkg -x`.

User-mode Linux is a kernel as an ordinary process: it needs no rights, reads
the files of this machine, writes none and has no network. In it are a server of
NFS and two hosts, each in namespaces of its own for network, mounts and name,
with a boot id of its own and its own connection to the server; so neither sees
what the other has in its caches. Processes on both hold the lock
(covenant/folder_lock.py) on two kinds of mounts:

  vers=3,nolock  flock succeeds on every host and is known to it alone
  vers=4.2       the server keeps flock for all hosts

It passes if the second host is always refused by a line with the name of the
first, if one of two that start at once holds the lock, if nobody waits after an
orderly end, if the lock of a process that was killed is taken over after 25 s,
and if a process that was stopped for longer, and whose lock was taken over, is
ended when it goes on. The exit status says so.
"""

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).parents[1]
MOUNTS = ('vers=3,nolock', 'vers=4.2')
PASSED = 'all cases passed'
_LIMIT_SECONDS = 900
_GRACE_SECONDS = 10  # in which a new server of version 4 grants no locks
_BOOT = '/proc/sys/kernel/random/boot_id'
_HOLD = """
import sys, time
from covenant import folder_lock
began = time.monotonic()
try:
  with folder_lock.hold(sys.argv[1]):
    print(f'held {time.monotonic() - began:.0f}', flush=True)
    sys.stdin.readline()
  print('released', flush=True)
except folder_lock.FolderInUseError as e:
  print(e, flush=True)
"""


class Host:
  """A host: namespaces of its own, in which NFS is mounted.

  Args:
    name: of the host, one letter.
    number: of its network.
    options: of its mount.
  """

  def __init__(self, name: str, number: int, options: str):
    self.name = name
    path = '/mnt/server' if 'vers=3' in options else '/'
    source, boot = f'10.77.{number}.1:{path}', f'/run/boot-{name}'
    pathlib.Path(boot).write_text(f'boot-{name}\n')
    setup = (
      f'hostname node-{name} && mount --bind {boot} {_BOOT} && '
      f'mount.nfs {source} /mnt/nfs -o {options} && echo ready && exec cat'
    )
    self._keeper = subprocess.Popen(
      ['ip', 'netns', 'exec', name, 'unshare', '--uts', 'sh', '-c', setup],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self._keeper.stdout is not None
    if self._keeper.stdout.readline() != 'ready\n':
      raise RuntimeError(f'node-{name} cannot mount {source} -o {options}')

  def hold(self, folder: str) -> 'Holder':
    """Starts a process that wants the lock of a folder on NFS."""
    pid = str(self._keeper.pid)
    # `exec`, so that the process is the one that signals reach.
    enter = ('nsenter', '--target', pid, '--mount', '--uts', '--net')
    return Holder([*enter, sys.executable, '-c', _HOLD, f'/mnt/nfs/{folder}'])

  def close(self) -> None:
    """Unmounts, by the end of the last process in the namespaces."""
    self._keeper.communicate()


class Holder:
  """A process that wants a lock, and holds it until it is told to end."""

  def __init__(self, command: list[str]):
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert self.process.stdout is not None
    self._lines = self.process.stdout

  def answer(self) -> str:
    """Returns 'held' and the seconds that it took, or why it is refused."""
    return self._lines.readline().strip()

  def end(self) -> str:
    """Tells it to end; returns what it says then."""
    said, _ = self.process.communicate('\n')
    return said.strip()


def check(what: str, found: str, is_right: bool) -> bool:
  """Prints a case and returns whether it is right."""
  print(f'{"passed" if is_right else "FAILED"}  {what}: {found}', flush=True)
  return is_right


def cases(options: str) -> bool:
  """Returns whether all cases are right on one kind of mount."""
  print(f'{options}', flush=True)
  a, b = Host('a', 1, options), Host('b', 2, options)
  right = []
  first = a.hold('one')
  right.append(check('the first', got := first.answer(), got == 'held 0'))
  second = b.hold('one').answer()
  right.append(check('the second', second, '(node-a, pid ' in second))
  first.end()
  third = b.hold('one')
  got = third.answer()
  right.append(check('after an orderly end', got, got == 'held 0'))
  third.end()

  both = [a.hold('two'), b.hold('two')]
  got = sorted(holder.answer() for holder in both)
  one = got[1] == 'held 0' and '(node-' in got[0]
  right.append(check('both at once', '; '.join(got), one))
  for holder in both:
    holder.end()

  first = a.hold('three')
  first.answer()
  first.process.kill()
  second = b.hold('three')
  got = second.answer()
  right.append(check('after a kill', got, got == 'held 25'))
  second.end()
  right.append(stopped(a, b, options))
  a.close()
  b.close()
  return all(right)


def stopped(a: Host, b: Host, options: str) -> bool:
  """Stops a holder for as long as a killed one is waited for."""
  first = a.hold('four')
  first.answer()
  first.process.send_signal(signal.SIGSTOP)
  second = b.hold('four')
  got = second.answer()
  if options != MOUNTS[0]:  # the kernel keeps the lock of a stopped process
    first.process.kill()
    return check('while it is stopped', got, '(node-a, pid ' in got)
  first.process.send_signal(signal.SIGCONT)
  status = first.process.wait()
  second.end()
  found = f'{got}, and the first ends with {status}'
  return check('while it is stopped', found, (got, status) == ('held 25', 1))


def inside(tools: str) -> None:
  """Makes a server, two hosts and all cases, as the first process."""
  try:
    _boot(tools)
    if all([cases(options) for options in MOUNTS]):
      print(PASSED, flush=True)
  except BaseException:
    traceback.print_exc()  # before the kernel ends
    raise
  finally:
    pathlib.Path('/proc/sysrq-trigger').write_text('o')
    time.sleep(60)  # until the kernel has ended


def _boot(tools: str) -> None:
  def run(*command: str) -> None:
    subprocess.run(command, check=True)

  run('mount', '-t', 'proc', 'proc', '/proc')
  run('mount', '-t', 'sysfs', 'sys', '/sys')
  for folder in ('/run', '/var/lib', '/mnt'):
    run('mount', '-t', 'tmpfs', 'tmpfs', folder)
  kmod = shutil.which('kmod')
  if kmod is None:
    raise RuntimeError('kmod is not here')
  pathlib.Path('/run/uml/lib').mkdir(parents=True)
  os.symlink(kmod, '/run/uml/modprobe')
  os.symlink(f'{tools}/usr/lib/uml/modules', '/run/uml/lib/modules')
  for module in ('overlay', 'veth', 'nfsd', 'nfsv3', 'nfsv4'):
    run('/run/uml/modprobe', '-d', '/run/uml', module)
  for folder in (
    *('/run/upper', '/run/work', '/run/rpcbind', '/mnt/nfs', '/mnt/server'),
    *('/var/lib/nfs/sm', '/var/lib/nfs/v4recovery'),
  ):
    pathlib.Path(folder).mkdir(parents=True)
  layers = f'lowerdir={tools}/etc:/etc' if tools else 'lowerdir=/etc'
  layers += ',upperdir=/run/upper,workdir=/run/work'
  run('mount', '-t', 'overlay', 'overlay', '-o', layers, '/etc')
  with open('/etc/passwd', 'a', encoding='utf-8') as file:
    file.write('_rpc:x:99:65534::/run/rpcbind:/bin/false\n')
  run('mount', '-t', 'tmpfs', 'tmpfs', '/mnt/server')
  run('mount', '-t', 'nfsd', 'nfsd', '/proc/fs/nfsd')
  for name in ('nfsv4leasetime', 'nfsv4gracetime'):
    pathlib.Path('/proc/fs/nfsd', name).write_text(f'{_GRACE_SECONDS}\n')
  run('ip', 'link', 'set', 'lo', 'up')
  for number, host in enumerate('ab', start=1):
    net = f'10.77.{number}'
    run('ip', 'netns', 'add', host)
    peer = ('type', 'veth', 'peer', 'name', 'eth0', 'netns', host)
    run('ip', 'link', 'add', f'to-{host}', *peer)
    run('ip', 'addr', 'add', f'{net}.1/24', 'dev', f'to-{host}')
    run('ip', 'link', 'set', f'to-{host}', 'up')
    run('ip', '-n', host, 'addr', 'add', f'{net}.2/24', 'dev', 'eth0')
    run('ip', '-n', host, 'link', 'set', 'eth0', 'up')
    run('ip', '-n', host, 'link', 'set', 'lo', 'up')
  run('rpcbind')
  for file in ('/etc/exports', '/var/lib/nfs/etab'):
    pathlib.Path(file).touch()
  options = 'rw,no_root_squash,no_subtree_check,insecure,fsid=0'
  run('exportfs', '-o', options, '10.77.0.0/16:/mnt/server')
  run('rpc.mountd')
  run('rpc.nfsd', '4')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--tools', default='')
  parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  tools = os.path.abspath(args.tools) if args.tools else ''
  if args.inside:
    inside(tools)
    return
  folders = ['/usr/sbin', '/usr/bin', '/sbin', '/bin']
  path = ':'.join([*(tools + x for x in folders if tools), *folders])
  kernel = shutil.which('linux.uml', path=path)
  if kernel is None:
    sys.exit('linux.uml is not here: apt-get install user-mode-linux')
  with tempfile.TemporaryDirectory() as folder:
    init = pathlib.Path(folder, 'init')
    init.write_text(
      f'#!/bin/sh\nexport PATH={path} PYTHONDONTWRITEBYTECODE=1\n'
      f'export PYTHONPATH={ROOT}\n'
      f'export LD_LIBRARY_PATH={tools}/usr/lib/x86_64-linux-gnu\n'
      f'exec {sys.executable} -S -m experiments.nfs_lock --inside'
      f' --tools={tools}\n'
    )
    init.chmod(0o700)
    command = f'{kernel} mem=512M root=/dev/root rootfstype=hostfs rootflags=/'
    command += f' ro init={init} con=null con0=null,fd:1 ssl=null quiet'
    command += f' umid=lock uml_dir={folder}/'
    done = subprocess.run(
      command.split(),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=_LIMIT_SECONDS,
    )
  found = done.stdout.partition(MOUNTS[0])[2].partition(PASSED)
  print(''.join([MOUNTS[0], *found[:2]]) if found[1] else done.stdout)
  sys.exit(0 if found[1] else 1)


if __name__ == '__main__':
  main()
