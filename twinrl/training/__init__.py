"""A run: its configuration, what is assembled from it, the loop, saving, and steps made again."""
