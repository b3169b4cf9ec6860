"""Random views of a batch: draw the parameters, then apply them."""
