"""What a run does when something fails: ranks, steps, signals, silence."""
