"""Loss of token rows through an endpoint: rows.py cuts, endpoint.py scores, mean.py averages; and what pruning adds."""
