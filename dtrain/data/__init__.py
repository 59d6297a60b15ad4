"""From (seed, step) to a batch of images, and where the images come from."""
