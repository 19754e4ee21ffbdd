"""What trains: the toy family, dense students, scores of experts, a policy."""
