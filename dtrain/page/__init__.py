"""One HTML file of runs: what they are, their curves, pictures and time."""
