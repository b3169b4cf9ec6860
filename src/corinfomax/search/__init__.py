"""Views that suit the images: short runs, compared."""
