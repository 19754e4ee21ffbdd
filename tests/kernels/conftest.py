"""Makes moe_cases importable to the tests beside it, and forces the paths of the CPU library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "native_path" in metafunc.fixturenames:
        from laguna_serve.kernels.sentinel_moe import cpu

        kernels = cpu.load()
        assert kernels is not None, "install g++"
        metafunc.parametrize("native_path", [path.name for path in kernels.paths if path.supported], indirect=True)


@pytest.fixture
def native_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A path of the CPU library that this processor can run, forced."""
    from laguna_serve.kernels.sentinel_moe import cpu

    kernels = cpu.load()
    assert kernels is not None
    assert kernels.use_path(request.param) == request.param
    yield request.param
    kernels.use_path(None)
