"""`python bench/swap`: the command line of run.py."""

from __future__ import annotations

from laguna_serve.bench.swap.run import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
