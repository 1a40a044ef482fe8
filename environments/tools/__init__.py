"""The tools environment: act in a small shop through typed tools, and be judged by what the shop looks like afterwards.

world.py is the shop in SQLite and the tools on it (what can be done), asks.py what may be asked at its desk (what should be done),
env.py the episode: calls, errors, failures, verdict (what was done).
"""

from environments.tools.env import ToolsEnv

__all__ = ["ToolsEnv"]
