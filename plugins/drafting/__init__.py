"""The drafter's part of a step on a CPU, without the detours that a GPU needs."""
