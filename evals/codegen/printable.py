"""Text of strangers (a program's messages, a model's names) in a form that a terminal, a log and JSON can take."""

from __future__ import annotations


def make_printable(text: str) -> str:
    """Put a text in one line.

    Line ends and tabs become blanks, what a terminal would act on is written as an escape.
    """
    if text.isprintable():
        return text
    return "".join(_escape(char) for char in text)


def _escape(char: str) -> str:
    if char in "\n\r\t":
        return " "
    # Not printable: control characters, halves of surrogate pairs, what reorders or hides text, odd blanks.
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
