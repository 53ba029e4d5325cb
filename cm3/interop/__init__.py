"""Foreign models: weights and classes of other projects. One file each; optional packages are imported here only."""
