"""Bundles from where their parts' authors publish them: pulled, checked, put into our layout."""
