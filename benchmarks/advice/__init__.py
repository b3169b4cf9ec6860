"""Advice on views and on length, held against what runs score."""
