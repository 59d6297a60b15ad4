"""One launcher for each scheduler: a job -> its files and commands."""
