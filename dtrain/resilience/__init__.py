"""What ends a run from outside: notices, hangs, a person's stop file."""
