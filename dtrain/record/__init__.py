"""What a person sees of a run, and when."""
