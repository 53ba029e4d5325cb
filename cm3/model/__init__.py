"""The CM3 transformer: configuration, layers, cache, loss and objective."""
