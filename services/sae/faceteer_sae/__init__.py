"""Embeddings to features, edits of features, and back to embeddings."""
