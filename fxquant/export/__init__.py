"""Files for other runtimes, and those runtimes as callables."""
