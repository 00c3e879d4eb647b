"""How fast: pytest-benchmark suites, and paired runs against llama.cpp and mlx-lm. No test here judges a time.

Every figure is shown beside what the machine could do in the same run, measured by `tests.speed.limits`.
"""
