"""This client and vLLM's own benchmark on one endpoint: what each measures, and the comparison."""
