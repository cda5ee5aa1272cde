"""Image bytes and text to CLIP embeddings."""
