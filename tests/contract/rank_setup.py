"""Imported by every rank of a contract test (`plugins=`): small pictures for the pipelines that want a megapixel."""

from tests.tiny import small_images

small_images().__enter__()
