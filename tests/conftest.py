"""Engines that several tests share, started when the first test asks for one; and defects planted in engines."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from warm import start_engines_warm
from warm.client import Warm, share

from laguna_serve.serving.engine import Engine, EngineConfig

# Tests that are not fast, from those that take longest.
RANKS = ("vllm", "slow", "gpu")
# A file of which no test is fast.
NOT_FAST = re.compile(rf"^pytestmark = .*\bpytest\.mark\.({'|'.join(RANKS)})\b", re.MULTILINE)
TOY = Path(__file__).resolve().parent / "toy"

# A crowded machine is not a fault of what is tested.
hypothesis.settings.register_profile("untimed", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast` a file that holds no fast test is not imported: some import vLLM, which takes seconds."""
    if config.option.markexpr != "fast" or collection_path.suffix != ".py":
        return None
    return NOT_FAST.search(collection_path.read_text(encoding="utf-8")) is not None or None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Let the workers fork their engines from one process, which imports vLLM while they collect."""
    if node.config.option.markexpr != "fast":
        node.workerinput["warm"] = share()


def pytest_configure(config: pytest.Config) -> None:
    """Find that process."""
    Warm.address = getattr(config, "workerinput", {}).get("warm")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """A million objects are made while torch, vLLM and the tests are imported, none of them garbage: not searched."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Have the interpreter find all objects when it ends: nanobind reports those that it does not.

    After pytest's own five searches.
    """
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is neither slow nor in need of vLLM or a GPU, before -m chooses; files that take long come first.

    Of files of one rank those with the most such tests do: a file runs on one worker, and none should be left alone
    with a long one at the end.
    """
    ranks: dict[Path, Counter[int]] = {}
    for item in items:
        rank = next((rank for rank, name in enumerate(RANKS) if item.get_closest_marker(name)), len(RANKS))
        if rank == len(RANKS):
            item.add_marker("fast")
        ranks.setdefault(item.path, Counter())[rank] += 1
    order = {path: (min(counts), -counts[min(counts)]) for path, counts in ranks.items()}
    items.sort(key=lambda item: order[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Real engines of the test's own process start warm (see tests/warm); those of `laguna serve` as users start them.

    It is decided before any fixture is set up.
    """
    start_engines_warm(item.get_closest_marker("vllm") is not None)


@pytest.fixture(scope="session")
def fp32_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The toy teacher in fp32, eager: what can be compared with transformers token for token.

    It can be paused and takes new weights; who gives it some gives it the old ones back. It returns routed experts.
    """
    config = EngineConfig(
        model=str(TOY / "teacher"),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=64,
        weight_updates=True,
        return_routed_experts=True,
        extra_args=("--enable-scale-out",),  # opens /inference/v1/generate
    )
    with Engine(config, log_path=tmp_path_factory.mktemp("engine") / "fp32.log") as engine:
        yield engine


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give engines started in this test a plugin of vLLM's: the source of a module with a `register` function."""

    def install(source: str) -> None:
        site = tmp_path / "site"
        metadata = site / "planted-0.dist-info"
        metadata.mkdir(parents=True)
        (site / "planted.py").write_text(source)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nplanted = planted:register\n")
        monkeypatch.setenv("PYTHONPATH", str(site))

    return install
