"""Train sparse autoencoders on embeddings of any corpus, and measure what their features do on it."""
