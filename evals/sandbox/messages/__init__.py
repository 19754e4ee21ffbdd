"""The pipe between a program and its tests: calls (rpc.py) in frames (pipe.py), and values as JSON (values.py).

forms.py says what a value consists of, making.py makes one of it; objects.py, proxies.py and exceptions.py are for what
has no form; kept.py follows arguments that outlive their call.
"""
