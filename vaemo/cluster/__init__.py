"""vaemo on Ray: the only package that imports it; each file is the distributed form of a module above it."""
