"""What meets the prefix cache: the configuration of bench/prefix_cache.py, and the engines that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from laguna_serve.bench.arms.arms import ArmSpec
from laguna_serve.bench.arms.drafters import DrafterConfig
from laguna_serve.bench.prefix.traffic import PLAIN, EngineSetting
from laguna_serve.serving.engine import EngineConfig
from laguna_serve.serving.kit.flags import Flag, Quick
from laguna_serve.serving.speculation.flags import Gamma


@dataclass(frozen=True, kw_only=True)
class PrefixCacheConfig(DrafterConfig):
    """A model, its drafter, and prompts to send cold, warm, in chunks, in groups and preempted; files go to `out`."""

    gamma: Gamma = None
    compiled: Annotated[bool, Flag("compile the model: slower to start five engines")] = False
    prompts: Annotated[Path, Flag('JSONL, one {"prompt": "…"} per line', metavar="FILE", group="what to send")]
    num_prompts: Annotated[int, Flag("joined prompts (default: 24)", metavar="N", at_least=4)] = 24
    characters: Annotated[
        int,
        Flag(
            "least length of a prompt, twice that of a long one; stay where the drafter is good (default: 320)",
            metavar="N",
        ),
    ] = 320
    max_tokens: Annotated[int, Flag("output tokens per request (default: 96)", metavar="N", at_least=8)] = 96
    block_size: Annotated[int, Flag("tokens in a KV block (default: 32)", metavar="N", at_least=1)] = 32
    small_blocks: Annotated[
        int,
        Flag(
            "KV blocks of the small cache, in which not all prompts fit together (default: 64)",
            metavar="N",
            at_least=1,
        ),
    ] = 64
    out: Annotated[Path, Flag("folder for the result files", metavar="DIR")]

    QUICK: ClassVar = Quick(
        "16 prompts × 48 tokens, a small cache of 40 blocks", {"num_prompts": 16, "max_tokens": 48, "small_blocks": 40}
    )

    @property
    def points(self) -> Path:
        """The folder of finished engines."""
        return self.out / "points"

    def make_spec(self, setting: EngineSetting) -> ArmSpec:
        """Make the engine of a setting; its name is its log's, too."""
        engine = EngineConfig(
            model=self.model,
            draft=None if setting.name == PLAIN else self.draft,
            gamma=None if setting.name == PLAIN else self.gamma,
            dtype=self.dtype,
            enforce_eager=not self.compiled,
            prefix_caching=setting.prefix_caching,
            seed=self.seed,
            extra_args=setting.extra_args,
        )
        return ArmSpec(setting.name.replace(", ", "-").replace(" ", "-"), setting.name, config=engine)
