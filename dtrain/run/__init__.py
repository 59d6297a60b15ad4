"""One run: its directory, its two tiers of checkpoints, where it goes on."""
