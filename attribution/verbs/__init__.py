"""Verbs of the command line that are more than a few lines; `cli` calls them, and imports each when it is asked for."""
