"""One run of arms side by side: what is compared, in which order, how it went, and what it says."""
