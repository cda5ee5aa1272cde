"""What each feature means: labels, examples, statistics, search."""
