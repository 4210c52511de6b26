"""Fingerprints: short texts that identify the examples of a source and their order, without reading all images."""

import hashlib
from typing import Any

import numpy as np

_DIGEST_BYTES = 8  # collision probability among 1,000 sources: about 3e-14


def digest(*texts: str | bytes) -> str:
    """Returns a hexadecimal digest of the texts and their order."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for text in texts:
        content = text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text
        digest.update(len(content).to_bytes(8, 'little') + content)
    return digest.hexdigest()


def evenly_spaced(total: int, count: int) -> list[int]:
    """Returns at most `count` evenly spaced positions in [0, total), including the first and the last one."""
    return np.unique(np.linspace(0, total - 1, count).astype(int)).tolist()


def fingerprint(source: Any) -> str:
    """Returns the fingerprint of a source, or a digest of its number of examples and class names if it has none."""
    own = getattr(source, 'fingerprint', None)
    return digest(type(source).__name__, str(len(source)), *source.class_names) if own is None else own


def describe(source: Any) -> dict[str, Any]:
    """Describes the examples of a source for JSON: their number, their splits and their fingerprint."""
    slices = getattr(source, 'slices', ())
    return {'examples': len(source), 'split': '+'.join(dict.fromkeys(each.split for each in slices)),
            'fingerprint': fingerprint(source)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a message for each difference between two descriptions of a source; empty if they are equal."""
    messages = []
    if before['split'] != now['split']:
        messages.append(f'split {before["split"]!r} then, {now["split"]!r} now')
    if before['examples'] != now['examples']:
        messages.append(f'{before["examples"]:,} examples then, {now["examples"]:,} now')
    if not messages and before['fingerprint'] != now['fingerprint']:
        messages.append(f'{now["examples"]:,} examples as before, but other ones or in another order')
    return messages
