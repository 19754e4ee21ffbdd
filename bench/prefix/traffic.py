"""What is sent to which engine to see whether a drafter's context survives prefix caching.

A DFlash drafter attends to keys and values made from the target's hidden states, which exist only for tokens that run
through the target. A token that comes from the prefix cache does not: its draft keys and values are those that an
earlier request wrote into the same block, if it did. Each scenario provokes one way in which they could be missing:
hits on a prompt's own blocks, on blocks that were filled in pieces (chunked prefill), in decoding, with rejected drafts
passing through (a second turn), by another member of a group, and after a request lost its blocks and came back
(preemption).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from laguna_serve.bench.harness.prompts import PromptsError
from laguna_serve.bench.harness.schedule import Round
from laguna_serve.serving.client.records import Prompt

GROUP = 8
TOGETHER = 8  # prompts that lose their blocks to each other in a small cache
CHUNK_TOKENS = 128
GROUP_LEAD = "\n"
FOLLOW_UP = "\n\n\ndef main():\n    "
REFERENCE = "no caching"
# The engine whose hits a drafter's are held against, and what its scenarios add to their names.
PLAIN = "caching, no drafter"


@dataclass(frozen=True, slots=True)
class EngineSetting:
    """One engine: its name in results, and what sets it apart."""

    name: str
    prefix_caching: bool
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """Rounds of prompts for one engine, greedy unless `sampled` at temperature 1.

    Sampled requests carry seeds, of which stock vLLM 0.32 dies on a CPU where a prompt is prefilled in pieces: this
    project's engines do not (plugins/repairs).

    Attributes:
        provokes: the engine's counter that has to move. Whether it does may hang on when requests come in: it is sent
            again, a few times, while it has not.
    """

    name: str
    engine: str
    rounds: tuple[Round, ...]
    sampled: bool = False
    provokes: str = ""

    @property
    def prompts(self) -> list[Prompt]:
        """List the prompts in order, a group's copies one by one."""
        return [prompt for prompts in self.rounds for prompt in prompts]

    @property
    def drafted(self) -> bool:
        """Whether its engine has a drafter."""
        return self.engine != PLAIN


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two scenarios over the same prompts, and what must have happened in the first for it to mean anything."""

    name: str
    scenario: str
    against: str
    provoked_by: str | None = None  # a field of Counters that must have counted


@dataclass(frozen=True, slots=True)
class Traffic:
    """Everything that is sent. Second turns need the first one's answers and are added when they are known."""

    engines: tuple[EngineSetting, ...]
    scenarios: tuple[Scenario, ...]
    comparisons: tuple[Comparison, ...]
    shorts: tuple[Prompt, ...] = field(default_factory=tuple)


def join_prompts(prompts: Sequence[Prompt], characters: int, count: int) -> list[Prompt]:
    """`count` longer prompts, each of whole prompts one after the other.

    Raises:
        PromptsError: the file has too few.
    """
    joined: list[Prompt] = []
    text, ids = "", []
    for prompt in prompts:
        text += prompt.text + "\n\n"
        ids.append(prompt.id)
        if len(text) >= characters:
            joined.append(Prompt("+".join(ids), text))
            text, ids = "", []
        if len(joined) == count:
            return joined
    expected = f"prompts enough for {count} of {characters} characters"
    remedy = "lower --num-prompts or --characters"
    raise PromptsError(f"--prompts: expected {expected}, got enough for {len(joined)}; {remedy}")


def plan_traffic(
    prompts: Sequence[Prompt], count: int, characters: tuple[int, int], blocks: int, block_size: int
) -> Traffic:
    """All scenarios over `count` short and half as many long prompts, of at least so many characters each.

    `blocks` of `block_size` tokens is the small KV cache under which requests lose their blocks.
    """
    shorts = join_prompts(prompts, characters[0], count)
    longs = join_prompts(list(reversed(prompts)), characters[1], max(2, count // 2))
    alone = tuple((prompt,) for prompt in shorts)
    long = tuple((prompt,) for prompt in longs)
    # Single prompts, as few tokens as can be, so that what grows in decoding outgrows what was admitted.
    singles = prompts[: TOGETHER * max(3, count // TOGETHER)]
    single = tuple((prompt,) for prompt in singles)
    together = tuple(tuple(singles[i : i + TOGETHER]) for i in range(0, len(singles), TOGETHER))
    groups = _copy(shorts[: max(6, count // 2)])
    # Enough where copies say the same; sampled ones scatter. Nothing else begins as they do, so that they can be cold.
    few_groups = _copy([Prompt(p.id, GROUP_LEAD + p.text) for p in shorts[: max(2, count // 4)]])
    size = ("--block-size", str(block_size))
    chunked = (*size, "--max-num-batched-tokens", str(CHUNK_TOKENS), "--max-num-seqs", "16")
    # A request of the greatest length must fit, in the blocks of every group of layers.
    longest = str(blocks * block_size // 4)
    small = (*size, "--num-gpu-blocks-override", str(blocks), "--max-model-len", longest)
    engines = (
        EngineSetting(REFERENCE, False, size),
        EngineSetting("caching", True, size),
        EngineSetting("caching, chunked", True, chunked),
        EngineSetting("small cache", False, small),
        EngineSetting("caching, small cache", True, small),
        EngineSetting(PLAIN, True, size),
    )
    scenarios = [
        Scenario("prompts", REFERENCE, alone),
        Scenario("long prompts", REFERENCE, long),
        Scenario("single prompts", REFERENCE, single),
        Scenario("groups of 8", REFERENCE, few_groups),
        Scenario("groups of 8 sampled", REFERENCE, groups, sampled=True),
        Scenario("prompts, cold", "caching", alone),
        Scenario("prompts, warm", "caching", alone),
        Scenario("long prompts, cold", "caching", long),
        Scenario("long prompts, warm", "caching", long),
        Scenario("groups of 8, cold", "caching", few_groups),
        Scenario("groups of 8, warm", "caching", few_groups),
        Scenario("groups of 8 sampled, warm", "caching", groups, sampled=True),
        Scenario("long prompts in chunks, cold", "caching, chunked", long),
        Scenario("long prompts in chunks, warm", "caching, chunked", long),
        Scenario("single prompts, preempted", "small cache", together, provokes="preemptions"),
        Scenario("single prompts, preempted, caching", "caching, small cache", together, provokes="preemptions"),
        Scenario("single prompts, preempted, warm", "caching, small cache", together, provokes="preemptions"),
        Scenario(name_plain("prompts, cold"), PLAIN, alone),
        Scenario(name_plain("prompts, warm"), PLAIN, alone),
        Scenario(name_plain("long prompts, cold"), PLAIN, long),
        Scenario(name_plain("long prompts, warm"), PLAIN, long),
        Scenario(name_plain("groups of 8, cold"), PLAIN, few_groups),
        Scenario(name_plain("groups of 8, warm"), PLAIN, few_groups),
    ]
    hits, lost = "prefix_cache_hits", "preemptions"
    comparisons = (
        Comparison("warm against cold", "prompts, warm", "prompts, cold", hits),
        Comparison("cold against no caching", "prompts, cold", "prompts"),
        Comparison("long, warm against cold", "long prompts, warm", "long prompts, cold", hits),
        Comparison("long, cold against no caching", "long prompts, cold", "long prompts"),
        Comparison("second turn against no caching", "second turn, warm", "second turn", hits),
        Comparison("in chunks against whole", "long prompts in chunks, cold", "long prompts"),
        Comparison("in chunks, warm against whole", "long prompts in chunks, warm", "long prompts", hits),
        Comparison("group against no caching", "groups of 8, cold", "groups of 8", hits),
        Comparison("group, warm against no caching", "groups of 8, warm", "groups of 8", hits),
        Comparison("sampled group, warm", "groups of 8 sampled, warm", "groups of 8 sampled", hits),
        Comparison("preempted against alone", "single prompts, preempted", "single prompts", lost),
        Comparison("preempted, caching, against alone", "single prompts, preempted, caching", "single prompts", lost),
        Comparison("preempted, warm, against alone", "single prompts, preempted, warm", "single prompts", lost),
    )
    return Traffic(engines, tuple(scenarios), comparisons, tuple(shorts))


def _copy(prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], ...]:
    """Make a group of copies of each prompt."""
    return tuple(tuple(Prompt(f"{p.id}#{i}", p.text) for i in range(GROUP)) for p in prompts)


def name_plain(scenario: str) -> str:
    """Name the scenario that sends the same to an engine without a drafter."""
    return f"{scenario}, no drafter"


def plan_second_turn(shorts: Sequence[Prompt], answers: dict[str, str], engine: str) -> Scenario:
    """Plan a second turn: a first prompt, its answer and the beginning of what comes next."""
    rounds = tuple((Prompt(p.id, p.text + answers[p.id] + FOLLOW_UP),) for p in shorts if p.id in answers)
    return Scenario("second turn" if engine == REFERENCE else "second turn, warm", engine, rounds)
