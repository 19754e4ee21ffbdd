"""The two arms that benchmarks compare: engines to start here, or endpoints that already run; and their flags."""
