"""The `polyrl` command."""

from infra.cli.main import main

__all__ = ["main"]
