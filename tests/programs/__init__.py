"""Programs that people have, each as its paper draws it, and small."""
