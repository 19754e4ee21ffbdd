"""Strangers' text as one printable line."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from laguna_serve.evals.codegen.printable import make_printable


@given(st.text(st.characters(codec=None)))
def test_any_text_becomes_one_line_that_everything_takes(text: str) -> None:
    found = make_printable(text)
    assert found.isprintable() or found == ""
    found.encode()
    assert json.loads(json.dumps(found)) == found


def test_what_is_harmless_stays() -> None:
    assert make_printable("naïve λ → 語") == "naïve λ → 語"
    assert make_printable("a\tb\nc") == "a b c"
    assert make_printable("\x1b[2J\x9b31m\u202e\ud83d\u2028") == "\\x1b[2J\\x9b31m\\u202e\\ud83d\\u2028"
