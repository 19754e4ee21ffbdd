"""Many requests at once: the limit of open files, of which most systems give 1,024, is raised as far as it goes."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator

import pytest

from laguna_serve.serving.client.completions import open_session

LOW = 512


@pytest.fixture
def low_limit() -> Iterator[int]:
    """A soft limit lower than the hard one, which is given back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= LOW:
        pytest.skip("the hard limit is as low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOW, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_session_of_a_load_raises_the_limit(low_limit: int) -> None:
    async def open_and_close() -> None:
        async with open_session():
            pass

    asyncio.run(open_and_close())
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (low_limit, low_limit)
