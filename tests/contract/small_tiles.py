"""Imported by ranks (`plugins=`) of the tests whose small pictures are of several tiles."""

from tests.tiny import small_tiles

# Held for the life of the process: a context that nobody holds is left at once.
CONTEXT = small_tiles()
CONTEXT.__enter__()
