"""Other worlds' environments, used as they are: Gymnasium, reasoning-gym, verifiers, NeMo-Gym. One file each.

Each imports its package only when an environment of that world is made, and says what to install when it is not there.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from environments.knobs import OptionError
from rl_core.types import Status, Verdict

MAX_EVIDENCE = 400  # characters


def need(module: str, install: str) -> ModuleType:
    """Import a package that only one bridge needs. Raises OptionError with what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptionError(f"this environment needs the package {module!r}, which cannot be imported ({error}); {install}") from error


def verifier_failed(what: str) -> Verdict:
    """The verdict when the other world's verifier broke: no reward, and not a zero."""
    return Verdict(status=Status.VERIFIER_ERROR, reward=None, evidence={"error": what[:MAX_EVIDENCE]})
