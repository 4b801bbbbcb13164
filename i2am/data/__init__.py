"""Reading the world's files."""
