"""Fingerprints: short texts that stand for the examples of a source and their order, made without reading any image."""

import hashlib
from typing import Any

_BYTES = 8  # two of a thousand sources agree by accident once in 10^13 times


def digest(*texts: str | bytes) -> str:
    """A digest of texts and their order, in hexadecimal."""
    made = hashlib.blake2b(digest_size=_BYTES)
    for text in texts:
        content = text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text
        made.update(len(content).to_bytes(8, 'little') + content)
    return made.hexdigest()


def fingerprint(source: Any) -> str:
    """The source's own fingerprint.

    The number of examples and the class names stand in for a source that has none.
    """
    own = getattr(source, 'fingerprint', None)
    return digest(type(source).__name__, str(len(source)), *source.class_names) if own is None else own


def describe(source: Any) -> dict[str, Any]:
    """The identity of a source's examples, for JSON: their number, the splits they come from, and the fingerprint."""
    parts = getattr(source, 'parts', ())
    return {'examples': len(source), 'split': '+'.join(dict.fromkeys(part.split for part in parts)),
            'fingerprint': fingerprint(source)}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two descriptions of a source, in words; empty where there are none."""
    said = []
    if before['split'] != now['split']:
        said.append(f'split {before["split"]!r} then, {now["split"]!r} now')
    if before['examples'] != now['examples']:
        said.append(f'{before["examples"]:,} examples then, {now["examples"]:,} now')
    if not said and before['fingerprint'] != now['fingerprint']:
        said.append(f'{now["examples"]:,} examples as before, but other ones or in another order')
    return said
