"""What runs inside the two processes: the program (worker.py), and its tests (grader.py).

The tests are rewritten (instrument.py, names.py), watched (observe.py, watcher.py) and tried with wrong answers
(probes.py); remote_program.py is the program as they see it, report.py how the grader reports.
"""
