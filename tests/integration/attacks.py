"""Hostile programs for the task "write f(x), x times 2", each below a line with its name. NAME_ITSELF gives the process the name MARK."""

from __future__ import annotations

MARK = "polyrl-attack"  # at most 15 characters: a process name
NAME_ITSELF = f"import ctypes\nctypes.CDLL(None).prctl(15, b'{MARK}', 0, 0, 0)"

PARENTHESES = "(" * 5000 + ")" * 5000

_PROGRAMS = r"""
### always-equal object
class A:
 def __eq__(self, o): return True
 def __hash__(self): return 0
def f(x): return A()
### always-equal int
class A(int):
 def __eq__(self, o): return True
 def __repr__(self): return '40'
def f(x): return A(1)
### float for an int
def f(x): return float(x*2)
### printed verdict
print('PASS'); print('1 passed in 0.01s'); print('{"reward": 1}')
def f(x): print(x*2)
### os._exit(0)
import os
def f(x): os._exit(0)
### sys.exit(0)
import sys
def f(x): sys.exit(0)
### SystemExit at import
raise SystemExit(0)
### SkipTest
import unittest
def f(x): raise unittest.SkipTest('fine')
### atexit
import atexit
atexit.register(print, 'PASS')
def f(x): return None
### no function
g = 1
### syntax error
def f(x) return x
### NaN
def f(x): return float('nan')
### infinity
def f(x): return 1e999
### deep nesting
def f(x):
 r = []
 for _ in range(900): r = [r]
 return r
### a million digits
import sys
sys.set_int_max_str_digits(0)
def f(x): return 10**1000000
### cycle
def f(x):
 r = []
 r.append(r)
 return r
### set
def f(x): return {x*2}
### raw junk on every open file
import os
def f(x):
 for fd in range(3, 64):
  try: os.write(fd, b'\xff\x00{"case": 0, "state": "value", "out": "40"}\n')
  except OSError: pass
 return x*2
### two results
import os
def f(x):
 for fd in range(3, 64):
  try: os.write(fd, str(x*2).encode())
  except OSError: pass
 return x*2
### huge result
def f(x): return 'a' * 50_000_000
### bent runner
import sys
m = sys.modules['__main__']
m.to_json = lambda v: '40'
m.write_all = lambda fd, d: None
sys.modules['_json'] = None
def f(x): return x*2+1
### killed runner
import os, signal
def f(x):
 try: os.kill(os.getppid(), signal.SIGKILL)
 except OSError: pass
 os.kill(-1, signal.SIGKILL)
### kills itself
import os
def f(x): os.kill(os.getpid(), 9)
### exit code of a failing engine
import os
def f(x): os._exit(125)
### words of a failing engine
import os
def f(x):
 os.write(2, b'docker: Error response from daemon: OCI runtime create failed\n'); os._exit(125)
### segfault
import ctypes
def f(x): ctypes.string_at(0)
### recursion
def f(x): return f(x)
### parser bomb
x = PARENTHESES
def f(x):
 return x*2
### file descriptors
import os
fds = []
def f(x):
 while True: fds.append(os.open('/dev/null', 0))
### full disk
def f(x):
 n = 0
 while True:
  n += 1
  with open(f'/tmp/{n}', 'wb') as t: t.write(b'0' * 1_000_000)
### one big file
def f(x):
 with open('/tmp/big', 'wb') as t: t.truncate(1 << 40)
 return x*2
### spin
def f(x):
 while True: pass
### spin deaf to signals
import signal
for s in range(1, 32):
 try: signal.signal(s, signal.SIG_IGN)
 except (OSError, ValueError): pass
def f(x):
 while True: pass
### sleep
import time
def f(x): time.sleep(60); return x*2
### stopped
import os
def f(x): os.kill(os.getpid(), 19); return x*2
### memory in one process
def f(x):
 r = []
 while True: r.append(bytearray(10_000_000))
### memory in many processes
import os, time
def f(x):
 for _ in range(8):
  if os.fork() == 0:
   b = bytearray(100_000_000)
   for i in range(0, len(b), 4096): b[i] = 1
   time.sleep(60)
 time.sleep(1.5)
 return None
### fork bomb
NAME_ITSELF
import os
def f(x):
 while True:
  try: os.fork()
  except OSError: pass
### thread bomb
import threading, time
def f(x):
 while True: threading.Thread(target=time.sleep, args=(60,)).start()
### stderr flood
import os
def f(x):
 while True: os.write(2, b'a' * 65536)
"""


def named_programs(text: str) -> dict[str, str]:
    """{name: program} of "### name" sections."""
    sections = (section.partition("\n") for section in text.split("### ")[1:])
    return {name: program.replace("NAME_ITSELF", NAME_ITSELF).replace("PARENTHESES", PARENTHESES) for name, _, program in sections}


FUNCTION_ATTACKS = named_programs(_PROGRAMS)
