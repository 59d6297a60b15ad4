"""What a generator is worth, in figures that say how they were measured."""
