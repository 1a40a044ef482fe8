"""Where the policy's programs run: never in a process of ours.

    job = SandboxJob(program="def f(x):\n return x+1", mode="function", inputs=(1, 2))
    choose_sandbox("auto").run(job)   ->   SandboxResult(kind="finished", stdout=b'...', ...)

Two backends with the same guarantees: Docker where an engine answers, bubblewrap elsewhere. Both start the same trusted
`runner.py` as an unprivileged user without network, and it runs each input in a fresh child process. What comes back is
hostile bytes; `reward_models.code_cases` reads them.
"""

from environments.sandbox.base import Limits, Sandbox, SandboxJob, SandboxResult, SandboxUnavailable
from environments.sandbox.choose import choose_sandbox

__all__ = ["Limits", "Sandbox", "SandboxJob", "SandboxResult", "SandboxUnavailable", "choose_sandbox"]
