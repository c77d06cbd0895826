"""What must not reach a file, a message or a log: access tokens, and the passwords in URLs."""

from __future__ import annotations

import re

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
SECRETS = re.compile(TOKEN.pattern + r"|(?<=://)[^/\s:@]*:[^\s@]*(?=@)")  # a password may hold a slash
IN_QUERY = re.compile(r"([?&][^=&\s]*(?:pass|pwd|secret|token)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return the text without access tokens and without user and password in URLs."""
    return IN_QUERY.sub(r"\1***", SECRETS.sub("***", text))
