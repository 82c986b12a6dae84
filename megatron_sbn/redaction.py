"""Text that is safe to show: without passwords, on one line, of a length that people read.

What people and files say turns up in messages, logs and records: a recipe's tracking URI may hold a password, a key of
a file from elsewhere a terminal's control sequence, or a million characters.
"""

import io
import re
import sys

LONGEST = 1200
_USER_INFO = re.compile(r"(:/{1,2})(?!/)[^/\s'\"]*@")  # one slash: what a path makes of a URL
_SECRET_SETTING = re.compile(r"(?i)((?:^|[?&;\s'\"])[\w.-]*(?:password|passwd|pwd|token|secret|api_?key)=)[^&;\s'\"]+")


def mask_secrets(text: str) -> str:
    """Replaces `user:password@` in URLs, and values named like passwords or tokens, by `***`."""
    return _SECRET_SETTING.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def one_line(text: str) -> str:
    """The text without secrets; unprintable characters as Python writes them, and the middle left out if it is long."""
    masked = mask_secrets(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in masked)
    if len(shown) <= LONGEST:
        return shown
    return f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 3 :]}"


def show_anything() -> None:
    """Has stdout write what it cannot encode as Python would: a file's name may be no text at all."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def excerpt(value: object, length: int = 80) -> str:
    """A value as Python writes it, without secrets, at most `length` characters of it."""
    shown = one_line(repr(value))
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."
