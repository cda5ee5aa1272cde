"""Measure a postcards bundle against the known truth of its pictures."""
