"""A plugin for ranks that never returns from its import."""

import time

time.sleep(3600)
