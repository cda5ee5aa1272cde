"""Offline jobs: make a bundle, train and evaluate SAEs, build a feature library."""
