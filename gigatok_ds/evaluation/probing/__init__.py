"""Linear probing: how much of an image's class a frozen model's features tell."""
