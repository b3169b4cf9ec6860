"""The loss: log-determinant mutual information between views, and its kernel form."""
