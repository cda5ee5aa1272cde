"""Embeddings to pictures, one denoising step at a time."""
