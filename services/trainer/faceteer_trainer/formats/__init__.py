"""SAEs in the file formats of others, to ours and back."""
