"""How much the linear probe loses by its choices."""
