"""The jobs' options: what a person types, turned into typed arguments of the functions that do the work."""
