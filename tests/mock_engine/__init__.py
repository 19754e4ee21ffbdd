"""One mock of a vLLM server, for every test that needs an engine and none in particular.

`MockEngine(Settings(...))` is a context manager with real HTTP at its `url`. What it says, how fast by which clock,
what it counts and how it fails are settings; what it was asked is in `bodies`, `seen` and `keys`.
"""

from mock_engine.clock import Clock
from mock_engine.engine import MockEngine, answering, scoring
from mock_engine.models import Rollouts, Said, Variants
from mock_engine.server import MockServer
from mock_engine.settings import Settings
from mock_engine.weights import START, Weights

__all__ = [
    "START",
    "Clock",
    "MockEngine",
    "MockServer",
    "Rollouts",
    "Said",
    "Settings",
    "Variants",
    "Weights",
    "answering",
    "scoring",
]
