"""Statistics of requests and of acceptance: numbers, never text."""
