"""For all tests: no example of Hypothesis fails for taking long. How fast something is depends on who runs beside it."""

from hypothesis import settings

settings.register_profile("polyrl", deadline=None)
settings.load_profile("polyrl")
