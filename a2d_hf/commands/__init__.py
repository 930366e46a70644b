"""One file per command of `a2d`: its arguments, and a `run` that loads what it needs when it is called."""
