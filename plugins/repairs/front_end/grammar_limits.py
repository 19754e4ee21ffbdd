"""Structured outputs that would fill the memory or hold the server for minutes are refused with a 400.

vLLM turns a request's schema into a grammar in the front end, before anything is scheduled, and in the engine again.
What xgrammar does not know goes to llguidance, or to outlines, where a number in the schema becomes as many states:
`{"type": "array", "minItems": 1000000000}` takes 80 GiB, and one request has the server killed. xgrammar counts such
numbers, but takes time in proportion to the square of an object's properties. The limits are far above what is
asked for in earnest: 100,000 states take 130 MiB and 0.3 s, 1,000 properties about a second.

Checked against vLLM 0.32.0 with xgrammar 0.2 and llguidance 1.7. It can go when
`tests/plugins/test_request_limits.py::test_stock_takes_any_number_in_a_schema` fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import backend_guidance, backend_outlines

COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
MOST_PROPERTIES = 1_000
MOST_GUIDANCE, MOST_OUTLINES = 100_000, 1_000
QUANTIFIER = re.compile(r"\{(\d*)(?:,(\d*))?\}")

stock_validate = SamplingParams._validate_structured_outputs


def check_properties(params: SamplingParams) -> None:
    """Raise a 400 for an object of too many properties."""
    for key, value in _walk(params):
        if key == "properties" and isinstance(value, dict) and len(value) > MOST_PROPERTIES:
            raise VLLMValidationError(
                f"structured outputs: an object may have at most {MOST_PROPERTIES} properties, got {len(value)}"
            )


def check_counts(params: SamplingParams, most: int) -> None:
    """Raise a 400 for a count above `most`, in the schema, or in a regular expression or grammar of the request."""
    for key, value in _walk(params):
        if key in COUNTS and isinstance(value, int | float) and value > most:
            _refuse(key, value, most)
        if isinstance(value, str) and key in ("pattern", "regex", "grammar", "patternProperties"):
            for match in QUANTIFIER.finditer(value):
                for digits in match.groups():
                    # Digits are compared by length first: int() refuses thousands of them.
                    if digits and (len(digits) > len(str(most)) or int(digits) > most):
                        _refuse(f"a repetition in {key}", digits[:20], most)


def _refuse(name: str, got: object, most: int) -> None:
    raise VLLMValidationError(
        f"structured outputs: {name} may be at most {most} beside what else the request asks for, got {got}"
    )


def _walk(params: SamplingParams) -> Iterator[tuple[str, Any]]:
    """Every key and value of a request's schema, structural tag, regular expression and grammar."""
    wish = params.structured_outputs
    if wish is None:
        return
    yield from (("regex", wish.regex), ("grammar", wish.grammar))
    waiting: list[Any] = []
    for document in (wish.json, wish.structural_tag):
        try:
            waiting.append(json.loads(document) if isinstance(document, str) else document)
        except (ValueError, RecursionError):
            continue  # what is no JSON, vLLM refuses in its own words
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from ((str(key), inner) for key, inner in value.items())
            yield from (("patternProperties", key) for key in value.get("patternProperties") or ())
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _limit(stock: Callable[..., None], most: int) -> Callable[..., None]:
    def validate(params: SamplingParams, *args: Any, **kwargs: Any) -> None:
        check_counts(params, most)
        stock(params, *args, **kwargs)

    return validate


def validate_structured_outputs(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
    """`SamplingParams._validate_structured_outputs`, behind the limits that hold for every backend."""
    check_properties(self)
    stock_validate(self, *args, **kwargs)


limited_guidance = _limit(backend_guidance.validate_guidance_grammar, MOST_GUIDANCE)
limited_outlines = _limit(backend_outlines.validate_structured_output_request_outlines, MOST_OUTLINES)


def apply() -> None:
    """Replace vLLM's method and functions, which it looks up at each request."""
    SamplingParams._validate_structured_outputs = validate_structured_outputs
    backend_guidance.validate_guidance_grammar = limited_guidance
    backend_outlines.validate_structured_output_request_outlines = limited_outlines
