"""Problems in a folder of images, before training."""
