"""How much a run needs, how much of it is computed at once, and how its memory is given back."""
