"""Do two arms answer alike: they are asked (runner.py), judged (verdict.py, exchangeability.py) and reported on."""
