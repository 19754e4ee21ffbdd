"""`laguna pad`: the way back from `laguna unpad`, which holds all of the code."""

from __future__ import annotations

import sys

from laguna_serve.scripts.checkpoints.unpad import main

if __name__ == "__main__":
    sys.exit(main(tool="pad"))
