"""What a recipe will take on a cluster, before anything is spent on it."""
