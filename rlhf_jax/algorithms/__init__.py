"""One file per algorithm: Config, loss, run. They never import each other."""
