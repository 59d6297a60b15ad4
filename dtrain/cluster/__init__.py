"""Who the workers of a run are, and how they agree."""
