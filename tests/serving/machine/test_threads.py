"""How many threads an engine on a CPU gets, and by whose OpenMP; what the caller has set stands."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from laguna_serve.serving.machine import threads
from laguna_serve.serving.machine.threads import (
    LARGE_BYTES,
    choose_threads,
    find_openmp,
    name_openmp,
    plan_threads,
)

MAPPED = "import torch; torch.ones(9).sum(); print(open('/proc/self/maps').read())"
INTELS = pytest.mark.skipif(find_openmp() is None, reason="vLLM brings Intel's OpenMP for x86 processors alone")


@pytest.mark.parametrize(
    ("cores", "weights", "chosen"),
    [
        (1, 1000, 1),
        (1, LARGE_BYTES, 1),
        (2, 1000, 1),
        (2, LARGE_BYTES - 1, 1),
        (2, LARGE_BYTES, 2),
        (2, 0, 2),
        (4, LARGE_BYTES, 4),
        (5, LARGE_BYTES, 4),
        (16, 0, 15),
    ],
)
def test_a_core_is_left_to_the_server_where_it_is_worth_it(
    cores: int, weights: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: cores)
    assert choose_threads(weights) == chosen
    assert plan_threads({}, weights)["OMP_NUM_THREADS"] == str(chosen)
    assert "OMP_NUM_THREADS" not in plan_threads({"OMP_NUM_THREADS": "3"}, weights)


@INTELS
def test_intels_openmp_is_the_one_that_torch_runs_on() -> None:
    planned = plan_threads({}, 1000)
    assert planned["KMP_BLOCKTIME"] == "10"
    done = subprocess.run(
        [sys.executable, "-c", MAPPED], env=planned, capture_output=True, text=True, timeout=120, check=True
    )
    assert "libiomp5.so" in done.stdout
    assert done.stderr == ""
    assert name_openmp(planned) == f"Intel's {metadata.version('intel-openmp')}"


@INTELS
@pytest.mark.parametrize("name", ["KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_how_threads_wait_is_the_callers(name: str) -> None:
    assert "KMP_BLOCKTIME" not in plan_threads({name: "passive"}, 1000)


@INTELS
def test_what_is_preloaded_stays_preloaded() -> None:
    library = find_openmp()
    assert plan_threads({"LD_PRELOAD": "/a.so"}, 1000)["LD_PRELOAD"] == f"/a.so:{library}"
    planned = plan_threads({"LD_PRELOAD": f"/a.so {library}"}, 1000)
    assert "LD_PRELOAD" not in planned
    assert planned["KMP_BLOCKTIME"] == "10"
    assert plan_threads({"LD_PRELOAD": "libgomp.so.1"}, 1000).keys() == {"OMP_NUM_THREADS"}
    assert name_openmp({"LD_PRELOAD": "/lib/libomp.so.5"}) == "LLVM's"


def test_without_intels_openmp_nothing_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_package: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(threads.metadata, "files", missing)
    assert find_openmp() is None
    assert plan_threads({}, 1000).keys() == {"OMP_NUM_THREADS"}
    assert name_openmp({}).startswith("GNU's")


class File:
    """A file of an installed package."""

    name = "libiomp5.so"

    def __init__(self, path: Path) -> None:
        self.path = path

    def locate(self) -> Path:
        """Return where it is."""
        return self.path


@pytest.mark.parametrize("folder", ["gone", "two words", "a:b"])
def test_a_library_that_the_loader_could_not_take_is_left_out(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / folder / "libiomp5.so"
    if folder != "gone":
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(threads.metadata, "files", lambda _package: [File(path)])
    assert find_openmp() is None
