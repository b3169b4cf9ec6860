"""What the package is measured by, each figure beside a rival or a bound that was timed in the same run."""
