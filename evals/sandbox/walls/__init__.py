"""The walls that a process puts up around itself: namespaces, Landlock, another user, limits, a filter of system calls.

jail.py puts them up, each of the others is one of them; system_calls.py has the tables of the filter.
"""
