"""What are these answers worth? Their programs run in the sandbox of the evaluations; no engine is needed.

python examples/grade_answers.py
"""

from __future__ import annotations

from laguna_serve.evals.codegen import Limits, Problem, choose_walls, grade_answer

PROBLEM = Problem(
    task_id="example/0",
    prompt='def middle(values: list[int]) -> int:\n    """The middle one of an odd number of values, by size."""\n',
    entry_point="middle",
    test=(
        "def check(candidate):\n"
        "    assert candidate([3]) == 3\n"
        "    assert candidate([9, 1, 5]) == 5\n"
        "    assert candidate([2, 2, 8, 7, 1]) == 2\n"
    ),
    canonical_solution="    return sorted(values)[len(values) // 2]\n",
)
ANSWERS = {
    "right": "Sort them first:\n```python\ndef middle(values):\n    return sorted(values)[len(values) // 2]\n```",
    "wrong for unsorted values": "```python\ndef middle(values):\n    return values[len(values) // 2]\n```",
    "without a program": "I would sort the values and take the one in the middle.",
    "never ending": "```python\ndef middle(values):\n    while True:\n        pass\n```",
    "ending the process": "```python\nimport os\n\ndef middle(values):\n    os._exit(0)\n```",
}


def main() -> None:
    """Grade each answer, as the reward of a training run would."""
    limits = Limits(wall_s=2.0, walls=choose_walls())
    for name, answer in ANSWERS.items():
        grade = grade_answer(PROBLEM, answer, "chat", limits).grade
        print(f"{name:<26} reward {grade.reward:.2f}  {grade.status:<8} {grade.detail}")


if __name__ == "__main__":
    main()
