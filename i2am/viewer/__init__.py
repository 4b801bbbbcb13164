"""One self-contained page where you point at a patch and see where it looked."""
