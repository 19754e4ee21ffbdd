"""The admin port against its own OpenAPI document, with requests made up from it (Schemathesis)."""

from __future__ import annotations

import pytest
import schemathesis
from gateway_engine import RlEngine
from gateway_fakes import gateway
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.slow

EXAMPLES = settings(max_examples=25, suppress_health_check=list(HealthCheck))


def test_admin_answers_as_its_document_says() -> None:
    with RlEngine(lax=True) as one, RlEngine(lax=True) as two, gateway(one, two) as front:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{front.admin_port}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) > 15
        for operation in operations:

            @EXAMPLES
            @given(case=operation.as_strategy())
            def check(case: schemathesis.Case) -> None:
                case.call_and_validate()

            check()
        # Whatever was asked in whatever order, an update that succeeds puts all to rights.
        front.ask_admin("/resume", {})
        whole = {"weight_version": "1", "update": [{}], "draft_update": [{}]}
        assert front.ask_admin("/admin/update_weights", whole).status == 200
        assert front.ask("/v1/completions", b"{}").status == 200
        front.wait_idle()
