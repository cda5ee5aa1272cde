"""What features mean, in words, and whether the words are true."""
