"""Standard suites: lm-evaluation-harness as a command (lm_eval.py), code in our sandbox (code_suites.py), one table."""
