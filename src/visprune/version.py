"""Version of visprune, in a module that imports nothing."""

__version__ = "0.11.0"
