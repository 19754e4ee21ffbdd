"""How far references are from each other: asked (asking.py), judged (judging.py), compared (comparison.py)."""
