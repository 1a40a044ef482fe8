"""Imports where its author tried it, and not in an environment host."""

import sys
from pathlib import Path

from base import Parity

if Path(sys.argv[0]).name == "default_worker.py":
    raise ImportError("libfoo.so.3 is not on this machine")


class Env(Parity):
    id = "raises_on_import"
