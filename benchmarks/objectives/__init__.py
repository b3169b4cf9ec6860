"""How CorInfoMax compares with other objectives."""
