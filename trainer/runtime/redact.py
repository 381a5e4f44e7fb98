"""Hide credentials in text for files and trackers; escape control characters for terminals."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

HIDDEN = "***"

# user:password@ before a host. The first form is RFC 3986; the second also matches a raw "/" in a
# password, which SQLAlchemy accepts.
_USER_INFO = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)"
    r"(?:[^\s'\"<>/?#]*@|[^\s'\"<>@/:]*:[^\s'\"<>]*@)",
    re.IGNORECASE,
)
_SECRET_WORD = r"(?:token|passwo?r?d|pwd|secret|api_?key|access_?key|sig|signature|credential)"
_QUERY = re.compile(rf"(?P<name>[?&][^=\s&]*{_SECRET_WORD}[^=\s&]*=)[^&\s'\"#]+", re.IGNORECASE)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Hide ``user:password@`` and ``?token=`` of every URI in a text, and ``secrets`` anywhere."""
    text = _USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def redact_value(text: str) -> str:
    """Redact one value, such as ``tracking.uri=...``, from ``://`` to the last ``@``."""
    return redact(re.sub(r"://.*@", f"://{HIDDEN}@", text, flags=re.DOTALL))


#: Control characters except tab and newline, surrogates, and marks for the direction of text.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Escape control characters as ``\\x1b``, so that text from files cannot control a terminal."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def secrets_of(uri: str) -> list[str]:
    """Return the ``is_distinct`` secrets in ``uri``, raw and percent-decoded, longest first."""
    secrets = set()
    user_info = _USER_INFO.match(uri)
    if user_info:
        inside = user_info.group(0)[len(user_info["scheme"]) : -1]
        secrets.add(inside.partition(":")[2] or inside)
    for match in _QUERY.finditer("?" + urlsplit(uri).query if "?" in uri else ""):
        secrets.add(match.group(0)[len(match["name"]) :])
    secrets |= {unquote(secret) for secret in secrets}
    return sorted((s for s in secrets if is_distinct(s)), key=len, reverse=True)


def is_distinct(secret: str) -> bool:
    """Whether a secret can be hidden in any text without hiding common words or numbers.

    Other secrets, such as the password "test", are hidden in addresses only.
    """
    if len(secret) < 8 or secret == HIDDEN:
        return False
    return len(secret) >= 16 or not (secret.isalpha() or secret.isdigit())
