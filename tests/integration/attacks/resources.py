"""Classes 1 to 7, 17, 20 and 24: programs that want more of the machine than they may have, or for longer."""

PROGRAMS = r"""
### 1 fork bomb -> late
NAME_ITSELF
import os
def f(x):
 while True:
  try: os.fork()
  except OSError: pass
### 1 fork bomb of sessions -> late
NAME_ITSELF
import os
def f(x):
 while True:
  try:
   if os.fork() == 0: os.setsid()
  except OSError: pass
### 1 forks as many as it can and returns
NAME_ITSELF
import os, time
def f(x):
 try:
  for n in range(1000):
   if os.fork() == 0: time.sleep(60); os._exit(0)
 except OSError: pass
 return n > 100
### 1 thread bomb
import threading, time
def f(x):
 while True: threading.Thread(target=time.sleep, args=(60,)).start()
### 2 memory in one process -> oom
def f(x):
 r = []
 while True: r.append(bytearray(10_000_000))
### 2 memory in many processes -> oom
import os, time
def f(x):
 for _ in range(8):
  if os.fork() == 0:
   b = bytearray(100_000_000)
   for i in range(0, len(b), 4096): b[i] = 1
   time.sleep(60)
 if os.wait()[1]: raise MemoryError
### 2 memory in files without a name -> oom
import os
def f(x):
 held = []
 while True:
  held.append(os.memfd_create('m'))
  for _ in range(7): os.write(held[-1], bytes(1 << 20))
### 2 shared anonymous memory -> oom
import mmap
def f(x):
 m = mmap.mmap(-1, 400 << 20)
 for i in range(0, len(m), 4096): m[i] = 1
### 2 memory in pipes
import fcntl, os
def f(x):
 held = []
 while True:
  r, w = os.pipe(); held.append((r, w)); os.set_blocking(w, False)
  fcntl.fcntl(w, 1031, 1 << 20)
  try:
   while True: os.write(w, bytes(65536))
  except BlockingIOError: pass
### 2 one allocation of a terabyte
def f(x): return len(bytearray(1 << 40))
### 2 repeated text
def f(x): return len('a' * (1 << 31))
### 3 endless output (stdin) -> flood
while True: print('40')
### 3 endless binary output (stdin) -> flood
import os
while True: os.write(1, b'\xff' * 65536)
### 3 one line of a gigabyte (stdin)
print('a' * 1_000_000_000)
### 3 one line of a hundred megabytes (stdin) -> flood
print('a' * 100_000_000)
### 3 stderr flood -> flood
import os
def f(x):
 while True: os.write(2, b'a' * 65536)
### 3 huge result -> flood
def f(x): return 'a' * 50_000_000
### 3 an error of ten megabytes
def f(x): raise ValueError('a' * 10_000_000)
### 3 terminal control characters
import os
def f(x):
 os.write(2, b'\x1b[2J\x1b]0;owned\x07\x1b[31m\x00\x9b2J'); raise ValueError('\x1b[2J\u202e')
### 3 binary junk around the right answer (stdin)
import os
os.write(1, b'\xff\xfe\x0040\r\x08')
### 4 closes stdin
import os
def f(x):
 os.close(0); return open('/dev/null').fileno()
### 4 reads past the end (stdin)
input(); input()
### 4 reads stdin that is not there
import sys
def f(x): return sys.stdin.read() or input()
### 4 never reads (stdin)
print(len('40'))
### 5 file descriptors
import os
fds = []
def f(x):
 while True: fds.append(os.open('/dev/null', 0))
### 5 full disk
def f(x):
 n = 0
 while True:
  n += 1
  with open(f'/tmp/{n}', 'wb') as t: t.write(b'0' * 1_000_000)
### 5 one big file
def f(x):
 with open('/tmp/big', 'wb') as t: t.truncate(1 << 40)
 return x*2
### 5 a file beyond its limit
import signal
signal.signal(25, signal.SIG_IGN)
def f(x):
 with open('/tmp/big', 'wb', buffering=0) as t:
  for _ in range(9):
   if t.write(bytes(1 << 20)) != 1 << 20: raise OSError
 return x*2
### 5 three thousand empty files, and the next case meets them
import os
def f(x):
 found = os.listdir('/tmp')
 for n in range(3000): os.close(os.open(f'/tmp/{n}', os.O_CREAT))
 return x*2 if found else None
### 5 a thousand folders deep, closed to their owner
import os
def f(x):
 found = os.listdir('/tmp')
 for _ in range(1000): os.mkdir('d'); os.chdir('d')
 for _ in range(1000): os.chdir('..'); os.chmod('d', 0)
 return x*2 if found else None
### 5 one file with a thousand names
import os
def f(x):
 found = os.listdir('/tmp')
 open('/tmp/a', 'w').close()
 for n in range(1000): os.link('/tmp/a', f'/tmp/{n}')
 return x*2 if found else None
### 6 spin -> late
def f(x):
 while True: pass
### 6 spin at import -> late
while True: pass
### 6 spin deaf to signals -> late
import signal
for s in range(1, 32):
 try: signal.signal(s, signal.SIG_IGN)
 except (OSError, ValueError): pass
def f(x):
 while True: pass
### 6 sleep -> late
import time
def f(x): time.sleep(60); return x*2
### 6 sleep, then spin -> late
import time
def f(x):
 time.sleep(1)
 while True: pass
### 6 stopped -> late
import os
def f(x): os.kill(os.getpid(), 19); return x*2
### 6 a regular expression that backtracks for ever -> late
import re
def f(x): return re.match('(a+)+$', 'a' * 40 + 'b')
### 6 one huge power, within the interpreter's C -> late
def f(x): return 7 ** 10 ** 9 % 10
### 6 waits for a lock for ever -> late
import threading
def f(x):
 lock = threading.Lock(); lock.acquire(); lock.acquire()
### 7 a daemon that writes after its case
NAME_ITSELF
import os, time
def f(x):
 if os.path.exists('/tmp/mark'): return x*2
 if os.fork() == 0:
  os.setsid()
  if os.fork() == 0:
   for _ in range(600): open('/tmp/mark', 'w').close(); time.sleep(0.1)
  os._exit(0)
 time.sleep(0.3)
### 7 a child that keeps the result pipe open
NAME_ITSELF
import os, time
def f(x):
 if os.fork() == 0: time.sleep(60)
 return x
### 7 a child deaf to signals
NAME_ITSELF
import os, signal, time
def f(x):
 if os.fork() == 0:
  for s in range(1, 32):
   try: signal.signal(s, signal.SIG_IGN)
   except (OSError, ValueError): pass
  time.sleep(60)
 return x
### 7 stopped children
NAME_ITSELF
import os
def f(x):
 for _ in range(4):
  if os.fork() == 0: os.kill(os.getpid(), 19)
 return x
### 17 patched clocks -> late
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
def f(x):
 time.sleep(60); return x*2
### 17 raises its own limits (probe)
import resource
def f(x):
 got = []
 for which in range(16):
  soft, hard = resource.getrlimit(which)
  if hard == resource.RLIM_INFINITY: continue
  try: resource.setrlimit(which, (hard, hard + 1)); got.append(which)
  except (OSError, ValueError): pass
 return got
### 17 a scheduler class of its own (probe)
import os
def f(x):
 got = []
 for policy in (os.SCHED_FIFO, os.SCHED_RR):
  try: os.sched_setscheduler(0, policy, os.sched_param(1)); got.append(policy)
  except OSError: pass
 try: os.nice(-5); got.append('nice')
 except OSError: pass
 return got
### 17 slow drip just below the limits -> late
import time
def f(x):
 for _ in range(1000): time.sleep(0.05)
 return x*2
### 17 says that its time is up -> late
import os
def f(x):
 os.kill(os.getpid(), 24)
 return x*2
### 17 deaf to the signal that its time is up -> late
import signal
def f(x):
 signal.signal(signal.SIGXCPU, signal.SIG_IGN)
 while True: pass
### 17 processor time hidden in children -> late
import os
def f(x):
 while True:
  pid = os.fork()
  if pid == 0:
   for _ in range(10 ** 6): pass
   os._exit(0)
  os.waitpid(pid, 0)
### 20 parser bomb
x = PARENTHESES
def f(x):
 return x*2
### 20 nested brackets
x = BRACKETS
def f(x): return x
### 20 a hundred thousand minus signs
x = MINUSES
def f(x): return x
### 20 nested functions
x = LAMBDAS
def f(x): return x
### 20 folded constants -> late
x = ((((((2 ** 63) ** 63) ** 63) ** 63) ** 63), 'a' * 4096 * 4096, (1,) * 256 * 256 * 256)
def f(x): return x
### 20 a source of zero bytes
exec(open('/dev/zero').read(1 << 24))
### 20 includes files of the host (probe)
def f(x):
 got = []
 for path in ('/etc/shadow', 'CANARY_FOLDER/gold.py', '/dev/mem'):
  try: exec(open(path).read()); got.append(path)
  except (OSError, SyntaxError): pass
 return got
"""
