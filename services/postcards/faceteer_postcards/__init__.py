"""Postcards: a small world drawn by us, so that what is true of every picture is known."""
