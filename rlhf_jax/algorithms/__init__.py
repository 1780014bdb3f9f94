"""One file an algorithm: Config, loss, run. They never import each other."""
