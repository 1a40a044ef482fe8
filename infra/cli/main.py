"""`polyrl`: one command, thin over the packages.

Exit codes: 0 all is well, 1 the run failed or was stopped, 2 wrong usage (one sentence on standard error, nothing was started).
Everything heavy (Ray, vLLM, torch) is imported by the command that needs it, after its arguments are known to be right.
"""

from __future__ import annotations

import sys

import typer

from infra.cli import (
    audits,
    chaos,
    clusters,
    configs,
    dashboard,
    envs,
    evals,
    models,
    queries,
    replays,
    results,
    rewards,
    runs,
    simulate,
    tools,
    verifiers,
)
from infra.errors import UsageError
from infra.view import visible
from rl_core.config import ConfigError
from rl_core.run_store import NoSuchRun

app = typer.Typer(
    help="Asynchronous, multi-environment RL post-training for language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for module in (
    runs,
    simulate,
    chaos,
    clusters,
    results,
    queries,
    dashboard,
    evals,
    replays,
    audits,
    envs,
    rewards,
    models,
    configs,
    tools,
    verifiers,
):
    module.register(app)


def user_errors() -> tuple[type[ValueError], ...]:
    """What a user can mend."""
    from environments.knobs import OptionError  # Gymnasium comes with them, which nearly no command needs
    from environments.registry import BrokenEnvironment, UnknownEnvironment

    return ConfigError, UnknownEnvironment, BrokenEnvironment, OptionError, NoSuchRun, UsageError


def main() -> None:
    """The console script."""
    try:
        app(prog_name="polyrl")  # also where it is called as a module: completion asks by this name
    except ValueError as error:
        if not isinstance(error, user_errors()):
            raise
        sys.stderr.write(f"polyrl: {visible(str(error), keep=chr(10))}\n")  # DuckDB and plugins quote what they were given
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our pipe has gone, for example `polyrl show latest | head`
        sys.exit(0)
    except KeyboardInterrupt:
        sys.stderr.write("polyrl: stopped\n")
        sys.exit(1)
