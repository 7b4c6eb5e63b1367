"""API keys: kept as digests, compared in constant time, and what a key's owner is called in the queue."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from denoised.errors import InvalidConfigError

_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Digits of a digest that name a tenant: enough to tell tenants apart, useless for finding the key.
_TENANT_DIGITS = 12


def digest(key: str) -> str:
    """`sha256:<hex>` of a key; a digest stays as it is.

    Raises:
        InvalidConfigError: an empty key would let everyone in.
    """
    if not key.strip():
        raise InvalidConfigError("api_key='': must not be empty; give a key, or leave it out.")
    if key.startswith(_PREFIX):
        if not _DIGEST.fullmatch(key):
            raise InvalidConfigError("api_key: sha256: must be followed by 64 hexadecimal digits; give a key's.")
        return key
    return _PREFIX + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def tenant(digests: Sequence[str], authorization: str | None) -> str | None:
    """Whose key an Authorization header carries; None if it is nobody's. All digests are compared, always."""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        return None
    given = _PREFIX + hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
    found = [hmac.compare_digest(given, known) for known in digests]
    return given.removeprefix(_PREFIX)[:_TENANT_DIGITS] if any(found) else None
