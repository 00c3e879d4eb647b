"""Record what every tensor should be, and check a backend against it."""
