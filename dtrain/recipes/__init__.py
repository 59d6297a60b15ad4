"""Models that come with dtrain and bring the phases of a step with them."""
