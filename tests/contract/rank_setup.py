"""Imported by every rank of a contract test (`plugins=`): small pictures for the pipelines that want a megapixel, and
stacks for the watchdog."""

from tests.tiny import small_images
from tests.watchdog import listen

# Held for the life of the process: a context that nobody holds is left at once.
CONTEXT = small_images()
CONTEXT.__enter__()
listen()
