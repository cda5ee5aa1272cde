"""A corpus of embeddings to a feature library: what each feature does, on which pictures, and with which others."""
