"""Writes pictures as embedding shards, and reads the shards for training and measuring."""
