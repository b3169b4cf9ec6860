"""How fast: views, loss, step, pipeline and memory, beside other libraries."""
