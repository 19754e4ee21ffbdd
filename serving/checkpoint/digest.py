"""What a checkpoint is, by its content, so that it is the same on another machine and in another folder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from laguna_serve.serving.kit.files import hash_file

# A folder of more is not read whole: its files' beginnings (safetensors' headers), ends and parts between are.
WHOLE_BYTES = 8 << 30
SAMPLES, SAMPLE_BYTES = 64, 1 << 18
BLOB = re.compile(r"[0-9a-f]{64}")
CONFIGURATION = ("config.json", "tokenizer.json", "hf_quant_config.json")


def digest_checkpoint(folder: Path, whole_bytes: int = WHOLE_BYTES) -> str:
    """`sha256:…` over names and contents of configuration, tokenizer and weights; `sampled:…` of very large folders.

    Files of the Hugging Face cache are named by their SHA-256 and need not be read.

    Raises:
        OSError: a file cannot be read.
    """
    paths = sorted(
        {*folder.glob("*.safetensors"), *(folder / name for name in CONFIGURATION if (folder / name).is_file())}
    )
    unread = [path for path in paths if _find_blob(path) is None]
    whole = sum(path.stat().st_size for path in unread) <= whole_bytes
    found = hashlib.sha256()
    for path in paths:
        content = _find_blob(path) or (hash_file(path) if whole else _sample(path))
        found.update(f"{path.name}\0{content}\n".encode())
    return f"{'sha256' if whole else 'sampled'}:{found.hexdigest()}"


def _find_blob(path: Path) -> str | None:
    """Find the SHA-256 that the Hugging Face cache names a file by; small files are named by something shorter."""
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and BLOB.fullmatch(target.name) else None


def _sample(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()
