"""The recipes: scripts of a checkout, `gatekv.recipes` where gatekv is installed; each runs with no argument."""
